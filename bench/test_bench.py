"""The scripts beside this file still work: a quick benchmark, some attacks, seconds of soak."""

from __future__ import annotations

import asyncio
import os
import re
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
from attacks import ATTACKS
from peers import PEER_ROWS, PICTURED
from processes import HERE
from questions import ask_all, measure
from run import ROWS
from soak import Soak, verdict

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" and not os.environ.get("CI"), reason="the figures are Linux's /proc"
)
PATIENCE_SECONDS = 120  # on a busy machine; alone both take some 10 s


async def run_script(name: str, *arguments: str) -> str:
    """Run a script to its good end and return what it prints."""
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, str(HERE / name), *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, err = await asyncio.wait_for(child.communicate(), PATIENCE_SECONDS)
    finally:
        if child.returncode is None:
            child.terminate()
            await child.wait()
    assert child.returncode == 0, out.decode() + err.decode()
    return out.decode()


async def test_quick_benchmark() -> None:
    """Every row has a figure of the floor and one of leflux, with its ratio."""
    printed = await run_script("run.py", "--quick")
    for _, title, _ in ROWS:
        row = re.escape(f"| {title} |") + r" [\d.,]+ \|.*\| [\d.,]+ \([\d.]+\) \|"
        assert re.search(row, printed), title
    assert re.findall(r"^\| (\d+.*?) \|", printed, re.M) == ["20", "40", "40, 5 of them streaming"]


async def test_quick_peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table and a picture of what is installed; the peers that are not are named."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    printed = await run_script("peers.py", "--quick", "--svg", str(tmp_path / "a.svg"))
    assert re.findall("^Left out: ([A-Z][a-z]+)", printed, re.M) == ["Express", "Chainlit"]
    for _, title, _ in PEER_ROWS[:-1]:
        row = re.escape(f"| {title} |") + r" [\d.]+ \| [\d.]+ \([\d.]+\) \|"
        assert re.search(row, printed), title
    drawn = ElementTree.parse(tmp_path / "a.svg")
    bars = drawn.findall(".//{*}rect")
    assert len(bars) == 2 * len(PICTURED)
    assert {float(bar.attrib["width"]) for bar in bars} >= {360}
    texts = [text.text for text in drawn.findall(".//{*}text")]
    assert texts.count("floor") == texts.count("leflux, with store") == len(PICTURED)


async def test_short_attacks() -> None:
    """Nobody waits for long while strangers do their worst; each attack has its row."""
    printed = await run_script("attacks.py", "--seconds", "0.3")
    for name in ATTACKS:
        assert re.search(rf"^\| {name} \|( [\d.]+ \|){{4}} \d+% \| \d+ \|$", printed, re.M), name


async def test_short_soak() -> None:
    """Nothing is lost in a few seconds with several kills."""
    printed = await run_script("soak.py", "--minutes", "0.1", "--visitors", "8")
    assert re.search(r"^problems +0$", printed, re.M)
    assert re.search(r"^SIGKILL +[1-9]", printed, re.M)
    assert re.search(r"^sessions checked +[1-9]", printed, re.M)


def ended_soak(folder: Path, kib_per_turn: float = 0, log: str = "") -> Soak:
    """A run of five minutes, one life and 20 turns a second, as it is when it is judged."""
    soak = Soak(folder, 0, "1")
    soak.life = 1
    turns = [(time.monotonic() + n, n * 20) for n in range(300)]
    soak.samples = [(1, at, 60_000 + n * kib_per_turn, n) for at, n in turns]
    (folder / "server.log").write_text(f"INFO leflux: stopping\n{log}\n")
    return soak


@pytest.mark.parametrize(("leak", "problems"), [(2.0, 0), (8.0, 1)])
async def test_growth_fails_the_soak(leak: float, problems: int, tmp_path: Path) -> None:
    """Memory that grows with each turn is a problem; what stays in the noise is none."""
    soak = ended_soak(tmp_path, leak)
    verdict(soak)
    assert len(soak.problems) == problems


@pytest.mark.parametrize("line", ["ERROR leflux: a turn failed", "Traceback (most recent call"])
async def test_errors_in_the_log_fail_the_soak(line: str, tmp_path: Path) -> None:
    """What the server logs as an error, and any traceback, is a problem."""
    soak = ended_soak(tmp_path, log=line)
    verdict(soak)
    assert len(soak.problems) == 1


def test_answers_are_found() -> None:
    """Of the questions of four made-up sites in four languages, as many as the README says."""
    results = ask_all()
    assert len(results) >= 200
    assert measure(results)[0] >= 0.9
    assert measure([one for one in results if one.shares])[0] >= 0.97
    assert measure([one for one in results if one.question.held_out])[0] >= 0.8
    admitted = [one.admitted for one in results if not one.question.answer]
    assert sum(admitted) >= 0.8 * len(admitted)
    for older in ("plain bm25", "version 0.1"):
        assert measure(results, older)[0] < 0.6
