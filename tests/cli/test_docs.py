"""docs/cli.md is what tools/render_cli_docs makes of the commands."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_current() -> None:
    loader = importlib.machinery.SourceFileLoader("render_cli_docs", str(ROOT / "tools" / "render_cli_docs"))
    spec = importlib.util.spec_from_loader("render_cli_docs", loader)
    assert spec is not None
    tool = importlib.util.module_from_spec(spec)
    loader.exec_module(tool)
    page = tool.render()
    assert "## visionkd distill" in page and "`--fit-teacher auto\\|probe\\|finetune\\|none`" in page
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == page, "run tools/render_cli_docs"
