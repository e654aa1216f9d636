"""Results as tables on stdout."""

from rich.console import Console
from rich.table import Table

# Groups of texts, and what one is called.
GROUPS = {"categories": "{}", "sources": "from {}", "turns": "turn {}", "roles": "to {}", "contexts": "{} tokens"}
COMPARED = ("acceptance_length", "tokens_per_forward", "tokens_per_s", "speedup")
WIDTH = 120  # columns, where the terminal doesn't say: tables in logs keep their headings whole


def print_values(values, title):
    """Flat values, a line each."""
    table = Table(title=title, show_header=False)
    for name, value in values.items():
        table.add_row(name, short(value))
    show(table)


def print_evaluation(values, title):
    """`scripts.evaluate`'s values: all prompts, vLLM where asked for, groups of texts, and the trees that would have been fastest."""
    nested = ("prompt_lookup", *GROUPS, "suggestion", "against")
    lookup = {f"prompt_lookup_{name}": values["prompt_lookup"][name] for name in COMPARED}
    against = against_rows(values["against"]) if "against" in values else {}
    print_values({name: value for name, value in values.items() if name not in nested} | lookup | against, title)
    print_groups(values)
    shape = ("lookahead", "nodes", "min_probability", "lookup")
    figures = ("candidates", "acceptance_length", "drafting_ms", "verifying_ms", "speedup")
    table = Table(*[name.replace("_", " ") for name in (*shape, *figures)], title="trees on this machine, and the speed-up expected")
    for row in values["suggestion"]:
        table.add_row(*[str(row[name] or "-") for name in shape], *[f"{row[name]:.2f}" for name in figures])
    show(table)


def print_groups(values):
    """The texts by category, source, turn, role and length of context, where there is more than one group of a kind, each once."""
    lookup, title = "prompt\nlookup's", "groups of texts, with 95% intervals over prompts"
    table = Table("texts", "count", "acceptance length", "tokens a forward", lookup, "speed-up", lookup, title=title)
    seen = []  # sources are categories too where rows name none
    for kind, shown_as in GROUPS.items():
        groups = values[kind] if len(values[kind]) > 1 and values[kind] not in seen else {}
        seen.append(groups)
        for name, group in groups.items():
            cells = []
            for figure in ("acceptance_length", "tokens_per_forward", "speedup"):
                theirs = f"prompt_lookup_{figure}"
                told = f" ({span(group[f'{figure}_interval'])})" if group["prompts"] > 1 else ""  # one prompt says nothing of others
                cells += [f"{group[figure]:.2f}{told}"]
                cells += [f"{group[theirs]:.2f}"] if theirs in group else []
            table.add_row(shown_as.format(name), str(group["texts"]), *cells)
        table.add_section()
    if table.row_count:
        show(table)


def against_rows(values):
    """Another engine's texts and acceptance beside ours."""
    name, texts, gap = f"{values['engine']} {values['version']}", values["texts"], values["largest_gap"]
    theirs, ours = (
        f"{short(values[f'{kind}_length'])} ({short(values[f'{kind}_per_position'])})" for kind in ("acceptance", "chain_acceptance")
    )
    apart = "" if gap is None else f"; where they part, logits at most {gap:.2g} apart in float32"
    return {
        f"texts of {name}": f"{texts['equal']} of {sum(texts.values())} equal{apart}",
        f"acceptance in {name}": f"{theirs}; our chain's {ours}",
    }


def show(table):
    """Print to stdout, all texts as they are: a name or a mend may look like rich's markup."""
    console = Console()
    width = None if console.is_terminal else max(console.width, WIDTH)
    Console(width=width, markup=False, emoji=False).print(table)


def short(value):
    """A JSON value in a cell: three decimals, whatever it is nested in."""
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, list):
        return " / ".join(map(short, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {short(item)}" for key, item in value.items())
    return str(value)


def span(interval):
    return f"{interval[0]:.2f} to {interval[1]:.2f}"


def print_results(machines, rows):
    """`report.machines` and `report.rows` of benchmark results."""
    table = Table("benchmark", "what", "with", "figures", title="\n".join(machines), show_lines=True)
    for row in rows:
        table.add_row(*row)
    show(table)


def print_recipes(lines, title):
    """`benchmark_recipe.compared`'s lines: acceptance of each variant's chain and against the first one's, with 95% intervals."""
    table = Table("variant", "length (95%)", "over the first (95%)", "by position", "averaged", "k tokens", "steps", title=title)
    for line in lines:
        low, high = line["more_interval"]
        table.add_row(
            line["variant"], f"{line['acceptance_length']:.3f} ({span(line['acceptance_length_interval'])})",
            f"{line['more']:+.3f} ({low:+.3f} to {high:+.3f})", " / ".join(f"{share:.3f}" for share in line["acceptance_per_position"]),
            f"{line['averaged']['acceptance_length']:.3f}", f"{sum(line['base_model_tokens'].values()) / 1000:.0f}", str(line["steps"]),
        )  # fmt: skip
    show(table)


def print_findings(findings):
    """What `doctor.examine` found, a line each."""
    table = Table("what", "state", "why, or how to mend it")
    for finding in findings:
        table.add_row(finding.name, finding.state, finding.detail)
    show(table)


def print_plan(plan, note, verdict):
    """A `plan.Plan`: memory by part and moment, work of a step, and its `plan.verdict`. note: where the lengths come from."""
    names = list(dict.fromkeys(part for parts in plan.moments.values() for part in parts))
    table = Table("GB a process", *plan.moments, title=f"memory ({note}; processes: {plan.ranks.count})")
    table.columns[0].no_wrap = True
    for name in names:
        sizes = [parts.get(name, 0) for parts in plan.moments.values()]
        if any(sizes):
            table.add_row(name, *(f"{size / 1e9:.2f}" if size else "" for size in sizes))
    table.add_row("together", *(f"{sum(parts.values()) / 1e9:.2f}" for parts in plan.moments.values()))
    show(table)
    device = plan.device
    rates = f"{device.flops / 1e12:.3g} TFLOP/s, {device.bandwidth / 1e9:.0f} GB/s"
    shares = f"{device.compute_share:.0%} and {device.bandwidth_share:.0%} of them reached"
    columns = ("a step of one process", "TFLOP", "GB of memory", "GB of network", "seconds")
    table = Table(*columns, title=f"work on {device.name} ({rates}; {shares})")
    for phase in plan.phases:
        parts = plan.work(phase)
        for part, work in parts.items():
            values = (work[0] / 1e12, work[1] / 1e9, work[2] / 1e9, plan.seconds(work))
            table.add_row(f"{phase}: {part}", *(f"{value:.3g}" for value in values))
        table.add_row(f"{phase}: together", "", "", "", f"{sum(map(plan.seconds, parts.values())):.3g}")
    show(table)
    if plan.config.hidden_state_cache:
        print(f"hidden-state cache on disk: {plan.disk / 1e9:.2f} GB; steps over rows it holds leave the base model out")
    print(verdict)
