"""Say what is installed, what will work, and why the rest won't: python -m scripts.doctor [--run=DIR]"""

import sys
from pathlib import Path

from pipelines.cli import arguments, main
from pipelines.machine.doctor import examine
from pipelines.show.console import print_findings


@arguments
class Arguments:
    """Look at this machine and this environment, and say what works here; exit code 1 where something is broken.

    Args:
        run: look at this run's out_dir instead: how far it is, which of its files are damaged, and how to go on with it.
    """

    run: str | None = None


def run(parsed):
    if parsed.run is None:
        findings = examine()
    else:
        from pipelines.train.run_state import examine_run  # with it comes transformers, which may be what is broken

        findings = examine_run(Path(parsed.run))
    print_findings(findings)
    sys.exit(any(finding.state == "broken" for finding in findings))


if __name__ == "__main__":
    main(Arguments, run, computes=False)
