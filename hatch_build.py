"""Puts the shipped models and recipes into the wheel, where `alignkit.shipped` finds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SHIPPED = ("assets", "recipes")


class ShippedFolders(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """An editable install keeps reading both folders from the checkout, so that no stale copy exists."""
        if version == "editable":
            return
        for name in SHIPPED:
            folder = Path(self.root) / name
            if not folder.is_dir():
                raise FileNotFoundError(f"the wheel must contain {name}/, but {folder} does not exist")
            build_data["force_include"][str(folder)] = f"alignkit/_shipped/{name}"
