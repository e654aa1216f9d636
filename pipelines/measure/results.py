"""Result files of all benchmarks: written line by line, read as one table and one list of ratios."""

import json
from pathlib import Path

from fms_spec.errors import UserError
from fms_spec.files import cannot_write, check_writable
from pipelines.machine.environment import environment


def read_results(paths):
    """Every line of the files, as dicts.

    Raises:
        UserError: a file that can't be read, or that isn't JSON lines of a benchmark.
    """
    lines = []
    for path in paths:
        try:
            texts = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"results {path}: can't be read ({getattr(error, 'strerror', None) or 'not UTF-8 text'})") from error
        for number, text in enumerate(texts, start=1):
            try:
                line = json.loads(text)
            except ValueError:
                line = None
            if not isinstance(line, dict) or not {"benchmark", "environment"} <= line.keys():
                raise UserError(f"results {path}, line {number}: no JSON line of scripts.benchmark; give files written with its --out")
            lines.append(line)
        if not texts:
            raise UserError(f"results {path}: holds no lines; give files written with --out of scripts.benchmark")
    return lines


def leaves(value, name=""):
    """(dotted name, value) of every plain value in nested dicts and lists."""
    if isinstance(value, dict | list):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        return [leaf for key, item in inner for leaf in leaves(item, f"{name}.{key}" if name else str(key))]
    return [(name, value)]


def rows(lines):
    """[benchmark, what, with, figures] of each line: its name, its settings (texts and whole numbers), and what was measured."""
    table = []
    for line in lines:
        values = leaves({key: value for key, value in line.items() if key not in ("benchmark", "name", "environment")})
        settings = ", ".join(f"{name} {value}" for name, value in values if not isinstance(value, float))
        figures = ", ".join(f"{name} {value:.4g}" for name, value in values if isinstance(value, float))
        table.append([line["benchmark"], line.get("name", ""), settings, figures])
    return table


def ratios(lines):
    """[(label, value)] of all figures that compare two things: their names say `over` or `speedup`."""
    pairs = []
    for line in lines:
        settings = [str(value) for name, value in line.items() if isinstance(value, (str, int)) and name not in ("benchmark", "name")]
        for name, value in leaves({key: value for key, value in line.items() if key != "environment"}):
            if isinstance(value, float) and ("over_" in name or name.split(".")[-1] == "speedup"):
                pairs.append((f"{line['benchmark']} {line.get('name', '')} ({', '.join(settings)}): {name}", value))
    return pairs


def machines(lines):
    """A line for each machine, revision and set of versions that the results come from."""
    keys = {}
    for line in lines:
        environment = line["environment"]
        versions = ", ".join(f"{name} {number}" for name, number in environment.get("versions", {}).items() if number)
        key = f"{environment.get('device', 'unknown machine')}; revision {environment.get('git_revision')}; {versions}"
        keys[key] = None
    return list(keys)


def markdown(lines):
    """The table as Markdown, under the machines."""
    heading = ["benchmark", "what", "with", "figures"]
    table = [heading, ["---"] * len(heading), *rows(lines)]
    return "\n".join(machines(lines)) + "\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in table) + "\n"


def check_out(out):
    """Raise UserError for a file that lines can't be appended to."""
    if not out:
        return
    if not Path(out).parent.is_dir():
        raise UserError(f"{out}: no such folder to write to; make it, or give another --out")
    check_writable(out)


def write_lines(benchmark, lines, out):
    """Print each result as a line of JSON, with the benchmark's name and what it was measured on, and append it to `out`."""
    measured_on = environment()
    for line in lines:
        text = json.dumps({"benchmark": benchmark} | line | {"environment": measured_on})
        print(text, flush=True)
        if out:
            append(out, text)


def append(out, text):
    """Add a line to a file."""
    try:
        with open(out, "a") as stream:
            stream.write(text + "\n")
    except OSError as error:
        raise cannot_write(out, error) from None
