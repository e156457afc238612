"""Say whether a run fits, with which settings, and how long it takes, on GPUs one need not have.

    python tools/plan.py MODEL=folder MAX_LENGTH=131072 GPU=H100 GPUS=8 [NAME=VALUE ...]

Only config.json of MODEL is read. GPU is a name in costs.GPUS; GPUS is their number; HOST_MEMORY is
the CPU memory of a host of 8 GPUs in GiB; DOCUMENT is the length of the documents in tokens, by
default one fills a row; TOKENS is how many the run trains. The other names are constants of
train.py. The first column is the plan. The others have half and twice the length, and other
sequence-parallel sizes. Rates were measured on H200s and are estimates for other GPUs.
"""
import ast
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import convert  # noqa: E402
import parallel  # noqa: E402
import train  # noqa: E402
from costs import (  # noqa: E402
    GPUS,
    GPUS_PER_HOST,
    count_parameters,
    fits,
    flops,
    host_memory,
    mean_attention_pairs,
    memory,
    step_seconds,
)
from model import Execution  # noqa: E402

OPTIONS = {"GPU": "H100", "GPUS": 8, "HOST_MEMORY": 1000, "DOCUMENT": 0, "TOKENS": 10**9}
SIZES = (1, 2, 4, 8)


class Column(NamedTuple):
    """One column of the table: its cells by the row's name, and its settings or why it fails."""
    cells: dict
    note: str


def read_options(arguments):
    """Set the constants of train.py. Returns OPTIONS with the values that were given."""
    options = dict(OPTIONS)
    constants = []
    for argument in arguments:
        name, _, text = argument.partition("=")
        if name == "GPU":
            options[name] = text
        elif name in OPTIONS:
            options[name] = int(float(ast.literal_eval(text)))  # TOKENS=1e12
        else:
            constants.append(argument)
    if options["GPU"] not in GPUS:
        raise ValueError(f"GPU {options['GPU']!r} is unknown: use one of {', '.join(GPUS)}.")
    train.override(constants)
    train.complete_constants()
    train.check_constants()
    return options


def make_column(config, options, length, sp):
    """Plan a run with MAX_LENGTH `length`. sp: SEQUENCE_PARALLEL_SIZE, 0 to choose it."""
    train.MAX_LENGTH = length
    train.SEQUENCE_PARALLEL_SIZE = sp
    world = options["GPUS"]
    gpu = GPUS[options["GPU"]]
    host_of_gpu = options["HOST_MEMORY"] / min(world, GPUS_PER_HOST)
    cells = {"MAX_LENGTH": f"{length:,}", "sequence parallel": f"{sp}" if sp else "?"}
    try:
        sp, settings = train.choose_settings(config, world, gpu, host_of_gpu)
        dp = parallel.check(
            world, train.REPLICAS, sp, config.num_attention_heads, config.num_key_value_heads)
        if train.GLOBAL_BATCH_SIZE % dp != 0:
            raise ValueError(f"GLOBAL_BATCH_SIZE {train.GLOBAL_BATCH_SIZE} is not a multiple of "
                             f"the data-parallel size {dp}.")
    except ValueError as error:
        cells["fits"] = "no"
        return Column(cells, str(error))

    document = min(options["DOCUMENT"] or length, length)
    n_documents = length / document
    pairs = n_documents * mean_attention_pairs(config, [0, document])
    work = train.work_of_gpu(config, world, sp, pairs)
    execution = settings.execution(Execution(loss_chunk=train.LOSS_CHUNK))
    offload = settings.offload_optimizer
    parts = memory(config, work.tokens, work.ranks, execution, settings.zero_stage,
                   work.accumulate, sp, offload)
    total = sum(parts.values())
    host = host_memory(config, work.tokens, work.ranks, execution, offload, sp)
    it_fits = fits(config, gpu, work, execution, settings, host_of_gpu)
    cells["sequence parallel"] = f"{sp}"
    cells["fits"] = "yes" if it_fits else "no"
    for part, size in parts.items():
        cells[f"  {part}, GiB"] = f"{size:.1f}"
    cells["GPU, GiB"] = f"{total:.1f}"
    cells["CPU memory a GPU, GiB"] = f"{host:.1f}"

    seconds = sum(step_seconds(
        config, gpu, work, execution, settings.zero_stage, offload).values())
    rows = train.GLOBAL_BATCH_SIZE
    needed, done = flops(config, rows * length, rows * pairs, settings.recompute,
                         settings.keep_layers)
    tokens_per_second = rows * length / seconds
    hours = options["TOKENS"] / tokens_per_second / 3600
    cells["seconds a step"] = f"{seconds:,.1f}"
    cells["tokens/s a GPU"] = f"{tokens_per_second / world:,.0f}"
    cells["MFU"] = f"{needed / seconds / world / gpu.peak:.1%}"
    cells["HFU"] = f"{done / seconds / world / gpu.peak:.1%}"
    cells["days"] = f"{hours / 24:,.1f}"
    cells["GPU-hours"] = f"{hours * world:,.0f}"
    return Column(cells, train.format_settings(settings, sp))


def show(columns):
    """Print the table, and below it the settings of every column."""
    names = max((list(column.cells) for column in columns), key=len)
    width = max(len(name) for name in names)
    for name in names:
        cells = [f"{column.cells.get(name, '-'):>11}" for column in columns]
        print(f"{name:<{width}}" + "".join(cells))
    print()
    for column in columns:
        sp = column.cells["sequence parallel"]
        print(f"{column.cells['MAX_LENGTH']} at {sp}: {column.note}")


def main(arguments):
    options = read_options(arguments)
    config = convert.load_config(train.MODEL)
    length = train.MAX_LENGTH
    sp = train.SEQUENCE_PARALLEL_SIZE
    block, embeddings = count_parameters(config)
    parameters = config.num_hidden_layers * block + embeddings
    print(f"{parameters / 1e9:.2f}B parameters on {options['GPUS']} x {options['GPU']}, "
          f"{train.GLOBAL_BATCH_SIZE} rows a step, {options['TOKENS']:,} tokens\n")
    wanted = [(length, sp), (length // 2, sp), (2 * length, sp)]
    wanted += [(length, size) for size in SIZES if size <= options["GPUS"]]
    show([make_column(config, options, *pair) for pair in wanted])


if __name__ == "__main__":
    main(sys.argv[1:])
