"""Where the recipes and trained models that come with alignkit are: in the checkout or inside the wheel."""

from __future__ import annotations

from pathlib import Path

from alignkit.errors import AlignkitError

PREFIX = "shipped:"
_PACKAGE = Path(__file__).resolve().parent


def path(*parts: str, package: Path = _PACKAGE) -> Path:
    """The file or folder that ships with alignkit.

    Args:
        parts: path inside the shipped folders, e.g. `"recipes"` or `"assets", "signs", "world.json"`.
        package: the folder of the `alignkit` package.

    Returns:
        The path inside the installed wheel (`alignkit/_shipped/`) or, where that folder is absent because
        alignkit runs from a checkout, beside the package.

    Raises:
        AlignkitError: neither place has it.
    """
    if not parts or any(part in ("", "..") or Path(part).is_absolute() for part in parts):
        raise AlignkitError(f"shipped.path{parts!r}: give names inside recipes/ or assets/, like 'recipes'")
    installed = package / "_shipped"
    root = installed if installed.is_dir() else package.parent
    found = root.joinpath(*parts)
    if not found.exists():
        raise AlignkitError(
            f"{'/'.join(parts)} does not ship with this alignkit (looked in {root}); reinstall the wheel, "
            "or in a checkout make sure that recipes/ and assets/ are complete"
        )
    return found


def resolved(place: str) -> str:
    """`shipped:assets/...` as a path on this machine; anything else as it is."""
    return str(path(*place.removeprefix(PREFIX).split("/"))) if place.startswith(PREFIX) else place
