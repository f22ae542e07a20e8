"""docs/models.md is what the registry says, and every family on it can be recognised."""

from __future__ import annotations

from pathlib import Path

from aphrodite.loading.config_reader import ConfigReader
from aphrodite.models.docs import models_page
from aphrodite.models.registry import FAMILIES, family_of_config, family_of_gguf

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def test_the_committed_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == models_page(), "run: python -m aphrodite.models.docs > docs/models.md"


def test_every_name_on_the_page_leads_to_its_family_alone() -> None:
    page = models_page()
    for family in FAMILIES:
        for name in family.architectures + family.wrapped_by:
            assert f"`{name}`" in page
            assert family_of_config(ConfigReader("config.json", {"architectures": [name]})) is family
        assert family_of_config(ConfigReader("config.json", {"model_type": family.name})) is family
        if family.gguf_architecture:
            assert f"`{family.gguf_architecture}`" in page
            values = {"general.architecture": family.gguf_architecture}
            assert family_of_gguf(ConfigReader("model.gguf", values)) is family
