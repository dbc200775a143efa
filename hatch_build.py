"""Puts the page's application into the wheel, beside other data; an editable installation uses it in place."""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class PageHook(BuildHookInterface):
    """`sources` moves folders only, and `force-include` would copy the file for an editable installation as well."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Adds it to wheels that are built to be installed."""
        if version == "standard":
            build_data["force_include"]["ui.py"] = "lora_compose/compose/ui.py"
