"""Say whether a run fits, with which settings, and how long it takes, on GPUs one need not have.

    python tools/plan.py MODEL=folder MAX_LENGTH=131072 GPU=H100 GPUS=8 [NAME=VALUE ...]

Only config.json of MODEL is read. GPU is a name in costs.GPUS, by default H100; GPUS is their
number, by default 8; HOST_MEMORY is the CPU memory of a host of 8 GPUs in GiB, by default 1000;
DOCUMENT is the length of the documents in tokens, by default one fills a row; TOKENS is how many the
run trains, by default 1e9. The other names are constants of train.py.

The first column of the table is the plan. The others have half and twice the length, and other
sequence-parallel sizes. Where a run does not fit, its column shows the settings that come nearest to
it, and whether the memory of the GPU or of the CPU is short. The parts of the memory are those at
its peak, when some of them are zero. Rates were measured on H200s and are estimates for other GPUs.
"""
import ast
import math
import signal
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import convert  # noqa: E402
import train  # noqa: E402
from costs import (  # noqa: E402
    GPUS,
    GPUS_PER_HOST,
    USABLE_HOST_MEMORY,
    candidates,
    count_parameters,
    flops,
    host_memory,
    mean_attention_pairs,
    memory,
    overruns,
    step_seconds,
)

OPTIONS = {"GPU": "H100", "GPUS": 8, "HOST_MEMORY": 1000, "DOCUMENT": 0, "TOKENS": 10**9}
SIZES = (1, 2, 4, 8)


class Column(NamedTuple):
    """One column of the table."""
    title: str
    cells: dict     # {name of the row: text}
    note: str       # the constants, or why the run is refused


def read_options(arguments):
    """Set the constants of train.py. Return OPTIONS with the values that were given."""
    options = dict(OPTIONS)
    constants = []
    for argument in arguments:
        name, _, text = argument.partition("=")
        if name == "GPU":
            options[name] = text.upper()
        elif name in OPTIONS:
            options[name] = read_number(name, text)
        else:
            constants.append(argument)
    if options["GPU"] not in GPUS:
        raise ValueError(f"GPU {options['GPU']!r} is unknown: use one of {', '.join(GPUS)}.")
    train.override(constants, OPTIONS)
    train.complete_constants()
    train.check_constants()
    return options


def read_number(name, text):
    """"1e12" -> 10**12. DOCUMENT may be 0, the others may not."""
    try:
        number = int(float(ast.literal_eval(text)))
    except (ValueError, SyntaxError, TypeError):
        number = -1
    if number < 0 or (number == 0 and name != "DOCUMENT"):
        raise ValueError(f"{name} {text!r} is not a number greater than 0: use one like "
                         f"{OPTIONS[name] or 8192}.")
    return number


def make_column(title, config, options, length, sp):
    """Plan a run with MAX_LENGTH `length`. sp: SEQUENCE_PARALLEL_SIZE, 0 to choose it."""
    train.MAX_LENGTH = length
    train.SEQUENCE_PARALLEL_SIZE = sp
    world = options["GPUS"]
    gpu = GPUS[options["GPU"]]
    host_of_gpu = host_memory_of_gpu(options)
    cells = {"MAX_LENGTH": f"{length:,}"}
    try:
        sizes = train.possible_sizes(config, world)
    except ValueError as error:
        return Column(title, {**cells, "fits": "refused"}, str(error))
    try:
        sp, execution = train.choose_settings(config, world, gpu, host_of_gpu)
    except ValueError:
        sp = sizes[-1]
        execution = nearest_settings(
            config, gpu, train.work_of_gpu(config, world, sp), host_of_gpu)

    work = train.work_of_gpu(config, world, sp)
    gpu_overrun, host_overrun = overruns(config, gpu, work, execution, host_of_gpu)
    it_fits = gpu_overrun <= 1 and host_overrun <= 1
    row = work.tokens * sp
    document = min(options["DOCUMENT"] or row, row)
    pairs = row / document * mean_attention_pairs(config, [0, document])
    cells["sequence parallel"] = f"{sp}"
    if it_fits:
        cells["fits"] = "yes"
    else:
        cells["fits"] = "NO:GPU" if gpu_overrun > 1 else "NO:CPU"
    cells.update(memory_cells(config, options, work, execution))
    if it_fits:     # a row of one document takes the most memory, but not this time
        work = work._replace(pairs=pairs, document=document)
        cells.update(time_cells(config, options, work, execution))
    note = train.format_settings(execution, sp)
    if not it_fits:
        note = f"does not fit; nearest to it is {note}"
        least = least_host_memory(config, gpu, work)
        if least is not None:
            of_host = math.ceil(least * min(world, GPUS_PER_HOST))
            note += f" (with HOST_MEMORY={of_host} it fits)"
    if sp > GPUS_PER_HOST:
        note += f" (rows are exchanged between hosts of {GPUS_PER_HOST} GPUs, which is slow)"
    return Column(title, cells, note)


def all_settings(config, work):
    """Return an iterator over the Executions that can be chosen, as far as they are not set by
    hand."""
    execution = train.execution_settings("cuda")
    return candidates(config, work, execution, train.settings_by_hand(config))


def nearest_settings(config, gpu, work, host):
    """Return the Execution that comes nearest to fitting, where none fits."""
    def overrun(execution):
        return max(overruns(config, gpu, work, execution, host))

    return min(all_settings(config, work), key=overrun)


def least_host_memory(config, gpu, work):
    """Return the GiB of CPU memory for each GPU with which some settings fit; None if the GPU is
    too small."""
    least = None
    for execution in all_settings(config, work):
        gpu_overrun, host = overruns(config, gpu, work, execution, host=1)
        if gpu_overrun <= 1:
            least = host if least is None else min(least, host)
    return least


def host_memory_of_gpu(options):
    """Return the GiB of CPU memory for each GPU of a host."""
    return options["HOST_MEMORY"] / min(options["GPUS"], GPUS_PER_HOST)


def memory_cells(config, options, work, execution):
    """Return what a GPU and its process need in GiB. Not all of a GPU's memory is usable."""
    usable_host = USABLE_HOST_MEMORY * host_memory_of_gpu(options)
    parts = memory(config, work, execution)
    host = host_memory(config, work, execution)
    cells = {f"GPU, of {GPUS[options['GPU']].memory:.0f} GiB": f"{sum(parts.values()):.1f}"}
    for part, size in parts.items():
        cells[f"  {part}"] = f"{size:.1f}"
    cells[f"CPU, of {usable_host:.0f} usable GiB"] = f"{host:.1f}"
    return cells


def time_cells(config, options, work, execution):
    """Return how fast a step is, and how long TOKENS take."""
    world = options["GPUS"]
    gpu = GPUS[options["GPU"]]
    seconds = sum(step_seconds(config, gpu, work, execution).values())
    rows = train.GLOBAL_BATCH_SIZE
    tokens = rows * work.tokens * work.sp
    needed, done = flops(
        config, tokens, rows * work.pairs, execution.recompute, execution.keep_layers,
        chunked=0 < execution.mlp_chunk < work.tokens)
    hours = options["TOKENS"] / tokens * seconds / 3600
    return {
        "seconds a step": f"{seconds:,.1f}" if seconds >= 1 else f"{seconds:.2g}",
        "tokens/s a GPU": f"{tokens / seconds / world:,.0f}",
        "MFU": f"{needed / seconds / world / gpu.peak:.1%}",
        "HFU": f"{done / seconds / world / gpu.peak:.1%}",
        "days": f"{hours / 24:,.1f}",
        "GPU-hours": f"{hours * world:,.0f}",
    }


def show(columns):
    """Print the table, and below it the constants of every column."""
    names = max((list(column.cells) for column in columns), key=len)
    width = max(len(name) for name in names)
    print(" " * width + "".join(f"{column.title:>12}" for column in columns))
    for name in names:
        cells = [f"{column.cells.get(name, '-'):>12}" for column in columns]
        print(f"{name:<{width}}" + "".join(cells))
    print()
    for column in columns:
        print(f"{column.title}: {column.note}")


def describe(config, options):
    """Return what is planned, and a warning if train.py would refuse the length."""
    block, embeddings = count_parameters(config)
    parameters = config.num_hidden_layers * block + embeddings
    name = options["GPU"]
    host = host_memory_of_gpu(options)
    text = (f"{parameters / 1e9:.2f}B parameters on {options['GPUS']} x {name} of "
            f"{GPUS[name].memory:.0f} GiB, {host:.0f} GiB of CPU memory each, "
            f"{train.GLOBAL_BATCH_SIZE} rows a step, {options['TOKENS']:,} tokens")
    if name != "H200":
        text += f"\nrates of {name} are estimates from those measured on H200"
    positions = max(config.max_position_embeddings, train.MAX_POSITION_EMBEDDINGS)
    if train.MAX_LENGTH > positions:
        text += (f"\nMAX_LENGTH {train.MAX_LENGTH:,} is beyond the model's {positions:,} "
                 f"positions: also set MAX_POSITION_EMBEDDINGS={train.MAX_LENGTH}")
    return text


def main(arguments):
    options = read_options(arguments)
    config = convert.load_config(train.MODEL)
    length = train.MAX_LENGTH
    sp = train.SEQUENCE_PARALLEL_SIZE
    train.possible_sizes(config, options["GPUS"])   # or the plan itself is refused
    print(f"{describe(config, options)}\n")

    plan = make_column("the plan", config, options, length, sp)
    columns = [
        plan,
        make_column("half", config, options, max(length // 2, 1), sp),
        make_column("twice", config, options, 2 * length, sp),
    ]
    for size in SIZES:
        is_plan = plan.cells.get("sequence parallel") == f"{size}"
        if options["GPUS"] % size == 0 and not is_plan:
            columns.append(make_column(f"sp {size}", config, options, length, size))
    show(columns)


if __name__ == "__main__":
    if len(sys.argv) == 1 or "--help" in sys.argv:
        print(__doc__)
        sys.exit()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # the output may be cut, as by `| head`
    try:
        main(sys.argv[1:])
    except Exception as error:
        train.report(error)
