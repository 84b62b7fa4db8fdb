"""What a real browser makes of `evaluate --report`: what the page shows, and that it asks nobody for anything.

`python tests/bench/report.py [FOLDER]` evaluates the quick start over three strengths and opens the report in a
headless Chromium, light and dark; the screenshots are left in FOLDER (results/report, by default).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

from ecoprompt.report import write_report

SWEEP = 'sweep={ "corruption.strength" = [1.0, 7.0, 50.0] }'
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
QUIET = ["--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking", "--no-first-run"]
QUIET += ["--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND"]

EVIL = "]]></style></svg><script>document.title = 'it ran'</script><img src='http://elsewhere.example/x.png'>"


class Page(HTMLParser):
    """The texts of a page by the id of the section that they are in, and the elements there."""

    def __init__(self, dom: str) -> None:
        super().__init__()
        self.section = ""
        self.texts: dict[str, list[str]] = {}
        self.elements: dict[str, list[str]] = {}
        self.feed(dom)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.section = (dict(attrs)["id"] or "") if tag == "section" else self.section
        self.elements.setdefault(self.section, []).append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self.section, []).append(data.strip())


def browse(page: Path, folder: Path, *options: str) -> tuple[str, list[str]]:
    """What a headless Chromium prints of a page, and the addresses that the page asked for."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        print("skipped: needs Chromium (apt-get install chromium)")
        sys.exit(0)
    log = folder / "net.json"
    command = [browser, "--headless", *QUIET, f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}"]
    done = subprocess.run(
        [*command, *options, page.resolve().as_uri()], capture_output=True, text=True, check=True, timeout=120
    )
    events = json.loads(log.read_text(encoding="utf-8"))["events"]
    started = [event["params"] for event in events if "initiator" in event.get("params", {})]
    asked = {one["url"] for one in started if one["initiator"] != "not an origin"}  # which is what Chromium itself asks
    shutil.rmtree(folder / "profile")
    log.unlink()
    return done.stdout, sorted(url for url in asked if not url.startswith(("file:", "data:", "chrome")))


def write_hostile(results: Path, folder: Path) -> Path:
    """The report of the same results, had every name, prompt and answer been written to run a script."""
    summary = json.loads((results / "summary.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (results / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    summary["recipe"] = EVIL
    summary["runs"] = {f"{name}{EVIL}": run for name, run in summary["runs"].items()}
    evil = [row | dict.fromkeys(("prompt", "target", "generation"), EVIL) | {"run": row["run"] + EVIL} for row in rows]
    folder.mkdir(exist_ok=True)
    return write_report(folder, summary, evil)


def main() -> None:
    """Evaluate, open the report, and check it."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "results/report")
    command = [sys.executable, "-m", "ecoprompt", "evaluate", "quickstart", "--set", SWEEP, "--output", str(folder)]
    subprocess.run([*command, "--report"], check=True, stdout=subprocess.DEVNULL)
    report = folder / "quickstart" / "report.html"
    dom, asked = browse(report, folder, "--dump-dom")
    page = Page(dom)
    runs = ["retain", "original", *(f"eco[corruption.strength={value}]" for value in ("1.0", "7.0", "50.0"))]
    assert set(runs) <= set(page.texts["results"])
    assert "svg" in page.elements["plot"]
    assert {"retain", "original", "eco", "forget quality ↑", "corruption.strength"} <= set(page.texts["plot"])
    prompts = page.elements["examples"].count("article")
    assert prompts == 12
    assert "In which town was Ilvara Quennell born?" in page.texts["examples"]
    assert all(any(text.startswith(run) for text in page.texts["examples"]) for run in runs)
    assert "script" not in sum(page.elements.values(), [])
    assert asked == []
    leaking = folder / "leaking.html"  # were a request made, it would be seen: an image, and no policy against it
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", report.read_text(encoding="utf-8"))
    leaking.write_text(text.replace("<h1>", f"{EVIL}<h1>"), encoding="utf-8")
    dom, asked = browse(leaking, folder, "--dump-dom")
    assert (asked, "<title>it ran</title>" in dom) == (["http://elsewhere.example/x.png"], True)
    hostile = write_hostile(report.parent, folder / "hostile")
    dom, asked = browse(hostile, folder, "--dump-dom")
    assert (asked, "<title>it ran</title>" in dom) == ([], False)
    assert "it ran" in "".join(Page(dom).texts["examples"])
    assert "script" not in sum(Page(dom).elements.values(), [])
    for name, options in {"light": [], "dark": ["--blink-settings=preferredColorScheme=0"]}.items():
        shot = folder / f"{name}.png"
        browse(report, folder, "--window-size=1000,2600", f"--screenshot={shot}", *options)
        print(f"{shot}: {shot.stat().st_size} bytes")
    size = report.stat().st_size
    print(f"{report}: {size} bytes, {len(runs)} runs, plot, {prompts} examples, no request")


if __name__ == "__main__":
    main()
