"""The Markdown files: local links lead somewhere; commands and files that are named exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
REQUIRED = ["README.md", "CONTRIBUTING.md", "LOG.md"]
PAGES = sorted({*REQUIRED, *(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))})
OURS = "v4jax|kernels_pallas|experiments|tests"


def anchors(text: str) -> set[str]:
    """The anchors that a host of Markdown makes of a page's headings."""
    headings = re.findall(r"^#+ +(.*?)\s*$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def leads_somewhere(page: Path, target: str) -> bool:
    name, _, anchor = target.partition("#")
    linked = page.parent / name if name else page
    if not linked.exists():
        return False
    return not anchor or linked.suffix != ".md" or anchor in anchors(linked.read_text("utf-8"))


@pytest.mark.parametrize("page", PAGES)
def test_local_links_lead_somewhere(page):
    prose = re.sub(r"```.*?```", "", (ROOT / page).read_text("utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)", prose) + re.findall(r'src="([^"]+)"', prose)
    local = [target for target in targets if not re.match(r"[a-z]+:", target)]
    assert [target for target in local if not leads_somewhere(ROOT / page, target)] == []


@pytest.mark.parametrize("page", PAGES)
def test_named_commands_and_files_exist(page):
    text = (ROOT / page).read_text("utf-8")
    code = "\n".join(re.findall(r"```.*?```|`[^`\n]+`|^ {4}.*?$", text, re.DOTALL | re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    missing = [f"make {name}" for name in re.findall(r"\bmake ([a-z][a-z-]*)", code)]
    missing = [command for command in missing if command.removeprefix("make ") not in targets]
    files = re.findall(rf"(?<![\w/.])((?:{OURS})/[\w/]+\.py)\b", code)
    files += [f"experiments/{name}.py" for name in re.findall(r"--experiment=([a-z]\w*)\b", code)]
    for module in re.findall(rf"-m ((?:{OURS})(?:\.\w+)*)", code):
        files.append(module.replace(".", "/") + ".py")
    assert missing + [name for name in files if not (ROOT / name).is_file()] == []
