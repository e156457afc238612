"""Write what README.md takes from the code: the table of constants, the plans, and line numbers.

    python tools/readme.py

Each constant has a line in train.py, with its default and a comment. The comment lines before a
group of constants become a heading in the table. A block of text that begins with a command of
tools/plan.py gets the output of that command, up to the constants of the first column. Diffs get the
numbers of the lines that they change.
"""
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BEGIN = "<!-- The table of constants, written by tools/readme.py -->\n"
END = "<!-- End of the table -->\n"
CONSTANT = re.compile(r"([A-Z_]+) = (.+?)(?: +# (.+))?")  # NAME = default    # comment
PLAN = re.compile(
    r"(```text\n\$ python tools/plan\.py MODEL=models/(\S+) ([^\n]+)\n)(.*?)```", re.DOTALL)

DIFF = re.compile(r"(?<=```diff\n)--- a/(\S+)\n.*?(?=```)", re.DOTALL)
HUNK = re.compile(r"^@@ -\d+,(\d+) \+\d+,(\d+) @@(.*)\n((?:[ +-].*\n|\n)*)", re.MULTILINE)

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
}
MODELS = {  # config.json of the models that are planned, as far as a plan needs it
    "Llama-3.1-8B": {**LLAMA, "num_hidden_layers": 32, "hidden_size": 4096,
                     "intermediate_size": 14336, "num_attention_heads": 32},
    "Llama-3.1-70B": {**LLAMA, "num_hidden_layers": 80, "hidden_size": 8192,
                      "intermediate_size": 28672, "num_attention_heads": 64},
}


def constants_table(source):
    """The text of train.py -> the table, in Markdown."""
    # The constants stand between the imports and the list of their names.
    before_list, _, _ = source.partition("\nCONSTANTS = ")
    rows = ["| constant | default | meaning |", "|---|---|---|"]
    heading = []
    for line in before_list.splitlines():
        constant = CONSTANT.fullmatch(line)
        if constant is not None:
            if heading:
                rows.append(f"| **{' '.join(heading)}** | | |")
                heading = []
            name, default, comment = constant.groups()
            rows.append(f"| `{name}` | `{default}` | {comment or ''} |")
        elif line.startswith("# "):
            heading.append(line.removeprefix("# "))
    return "\n".join(rows) + "\n"


def with_table(readme, table):
    """The text of README.md -> the same text with `table` between BEGIN and END."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table + END + after


def plan(model, arguments):
    """A key of MODELS, and the other arguments of tools/plan.py -> what it prints of the plan."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODELS[model]))
        words = [f"MODEL={folder}", *arguments.split()]
        result = subprocess.run([sys.executable, ROOT / "tools" / "plan.py", *words], text=True,
                                stdout=subprocess.PIPE, check=True)
    # A heading, the table, and the constants of each column.
    heading, table, constants = result.stdout.split("\n\n")
    return f"{heading}\n\n{table}\n\n{constants.splitlines()[0]}\n"


def with_plans(readme):
    """The text of README.md -> the same text with the output of each plan after its command."""
    def write(block):
        command, model, arguments, _ = block.groups()
        return f"{command}{plan(model, arguments)}```"

    return PLAN.sub(write, readme)


def with_line_numbers(readme):
    """The text of README.md -> the same text, whose diffs name the lines where the code is now."""
    def write(diff):
        code = (ROOT / diff[1]).read_text().splitlines()
        shift = 0   # lines that earlier hunks add

        def number(hunk):
            nonlocal shift
            n_old, n_new, context, lines = hunk.groups()
            old = [line[1:] for line in lines.splitlines() if not line.startswith("+")]
            [first] = [i for i in range(len(code)) if code[i:i + len(old)] == old]
            header = f"@@ -{first + 1},{n_old} +{first + 1 + shift},{n_new} @@{context}"
            shift += int(n_new) - int(n_old)
            return f"{header}\n{lines}"

        return HUNK.sub(number, diff[0])

    return DIFF.sub(write, readme)


def main():
    path = ROOT / "README.md"
    table = constants_table((ROOT / "train.py").read_text())
    path.write_text(with_line_numbers(with_plans(with_table(path.read_text(), table))))


if __name__ == "__main__":
    main()
