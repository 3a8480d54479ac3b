"""Check that every relative link in the Markdown files leads to a file."""

import re
import sys
from pathlib import Path

broken = [
    f"{page}: {target}"
    for page in [Path("README.md"), *Path("docs").glob("*.md")]
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text())
    if not target.startswith(("http://", "https://")) and not (page.parent / target).exists()
]
print("\n".join(broken) or "links: all lead somewhere")
sys.exit(bool(broken))
