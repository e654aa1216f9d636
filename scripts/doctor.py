"""Say what is installed, what will work, and why the rest won't: python -m scripts.doctor"""

import sys

from pipelines.doctor import examine
from pipelines.tables import print_findings
from scripts.cli import arguments, main


@arguments
class Arguments:
    """Look at this machine and this environment, and say what works here; exit code 1 where something that is installed is broken."""


def run(parsed):
    findings = examine()
    print_findings(findings)
    sys.exit(any(finding.state == "broken" for finding in findings))


if __name__ == "__main__":
    main(Arguments, run)
