#!/usr/bin/env python3
"""How often is the answer found? Asks the questions of four made-up sites (bench/sites).

    python bench/questions.py [--misses]

Each site is a small website in English, German, Spanish or Japanese, its pages kept as a crawl
would keep them. Its questions are in its file: `? question | words of the passage that answers`,
a follow-up as `? first message >> question | ...`, and with nothing after the bar one that the site
does not answer. Every fifth is held out: nothing was tuned on it.

recall@3: the share of the answerable questions whose passage is among the first three; MRR: the
mean of 1 / its place. "admitted": of the unanswerable ones, how many the offline guide marks with
answered: false. Beside the server's ranking stand plain bm25, and the one of version 0.1 (the
number of different words, English synonyms, then bm25), over the same passages.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sqlite3
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import leflux_server as lf  # noqa: E402

COMMON = set(  # words that are no sign of a common subject
    """about after also another are bring can come does from give have here into long many much
    need offer place their them there they this time what when where which while will with your
    aber auch beim bietet dass dauert denn dies dieser eine einem einen einer euch euer etwas
    geben gibt habe haben habt hier ihnen ihre ihren kann kannst können könnt machen mein meine
    mich mein mit möchte muss nach oder seid sein seit sich sind sucht über und unser verwendet
    wann warum welche welches wenn werden wieder wird wohin zum ahora algo aquí como cómo con cuál
    cuándo cuánta cuántas cuánto cuántos cuesta dan desde donde dónde ellos está están esto hace
    hasta hay los más nuestro para pero poder puede pueden puedo qué quién ser sobre solo son
    tiene tienen tengo una usted""".split()
)


class Question(NamedTuple):
    site: str
    earlier: str
    text: str
    answer: str  # "" if the site does not answer it
    held_out: bool


def read_site(path: Path) -> tuple[list[lf.WebPage], list[Question]]:
    """Read a file of bench/sites: its pages and its questions."""
    pages, _, questions = path.read_text(encoding="utf-8").partition("\n? ")
    found = []
    for page in re.split(r"^= ", pages, flags=re.M)[1:]:
        head, _, body = page.partition("\n")
        url, _, title = head.partition(" | ")
        first, *rest = re.split(r"^# ", body, flags=re.M)
        sections = [("", first.strip())] if first.strip() else []
        sections += [(part.partition("\n")[0], part.partition("\n")[2].strip()) for part in rest]
        found.append(lf.WebPage(url, title, tuple(sections)))
    asked = []
    for number, line in enumerate(questions.split("\n? ")):
        said, _, answer = line.rpartition("|")
        earlier, _, text = said.rpartition(" >> ")
        held_out = number % 5 == 4
        asked.append(Question(path.stem, earlier, text.strip(), answer.strip(), held_out))
    return found, asked


def folded(text: str) -> str:
    plain = unicodedata.normalize("NFKD", text.casefold())
    return "".join(c for c in plain if not unicodedata.combining(c))


def subjects(text: str) -> set[str]:
    """The words of a text that carry its meaning, roughly: what two texts can share."""
    words = set(re.findall(r"[^\W\d_]{4,}|\d{2,}", folded(text))) - set(map(folded, COMMON))
    runs = re.findall(r"[\u30a0-\u30ff\u3400-\u9fff]{2,}", text)
    return words | {run[at : at + 2] for run in runs for at in range(len(run) - 1)}


# The rankings: functions of (passages, question, message before it) to passages, best first.
Ranking = Callable[[Question], list[str]]


def plain_index(texts: Iterable[str]) -> sqlite3.Connection:
    db = sqlite3.connect(":memory:")
    tokens = "tokenize='porter unicode61 remove_diacritics 2'"
    db.execute(f"CREATE VIRTUAL TABLE passage USING fts5(text, {tokens})")
    db.executemany("INSERT INTO passage (rowid, text) VALUES (?, ?)", enumerate(texts))
    return db


def plain_bm25(db: sqlite3.Connection, texts: list[str]) -> Ranking:
    def ranked(question: Question) -> list[str]:
        words = " OR ".join(f'"{word}"' for word in re.findall(r"\w+", question.text))
        sql = "SELECT rowid FROM passage WHERE passage MATCH ? ORDER BY rank, rowid LIMIT 20"
        return [texts[row] for (row,) in db.execute(sql, (words,))]

    return ranked


STOP_WORDS = set(
    """about accept after all also am an and any anything are as at available be been bring but
    button by can click could did do does doing don else ever find for form from get give go going
    good got had has have having hello help her here hers hey hi him his how if in into is it its
    just keep kind know let like link ll look looking many may me might more much must my need no
    not number of off offer on one or our out over own page people please possible press re say see
    sell she should show site so some someone something sort still tell than thank thanks that the
    their them then there these they thing this those to too up us use ve want was way we website
    were what when where which who whose why will with won work would yes you your yours""".split()
)
SYNONYMS = [
    group.split()
    for group in """price pricing cost charge expensive cheap much / time when hour
    / long day week minute month / address where locat situated direction
    / contact email mail phone telephone / discount reduc / ship deliv postage courier dispatch
    / return refund exchang / abroad internation worldwide overseas outside / open clos shut
    / pay paid / gift voucher / guarant warrant / cancel terminat / job career vacanc / repair fix
    / rent hire lend / course workshop lesson / wheelchair accessib""".split("/")
]
SIGNS = re.compile(
    r"(?P<price>[€$£])|(?P<email>@)|(?P<discount>%)|(?P<address>\b(street|road|lane|avenue)\b)"
    r"|(?P<time>\d:\d\d|\Bdays?\b|\d ?[ap]m\b)",
    re.I,
)


def version_0_1(db: sqlite3.Connection, texts: list[str]) -> Ranking:
    """By how many of the question's different words a passage holds, then by bm25."""

    def queries(question: str) -> list[str]:
        found = []
        for word in re.findall(r"[^\W_]{2,}|\d|[^\W\x00-\x7f]", question.lower()):
            same = next((group for group in SYNONYMS if word.startswith(tuple(group))), [])
            begins = [f'"{one}" *' for one in same if one not in STOP_WORDS]
            if begins or word not in STOP_WORDS:
                found.append(" OR ".join(begins) or f'"{word}"')
        return list(dict.fromkeys(found))[:32]

    def ranked(question: Question) -> list[str]:
        words, sql = queries(question.text), "SELECT rowid FROM passage WHERE passage MATCH ?"
        held = Counter(row for word in words for (row,) in db.execute(sql, (word,)))
        best = db.execute(sql + " ORDER BY rank, rowid", (" OR ".join(words),)) if held else ()
        rows = [row for (row,) in best]
        return [texts[row] for row in sorted(rows, key=lambda row: -held[row])[:20]]

    return ranked


def asked_of_server(knowledge: lf.Knowledge, site: str) -> Ranking:
    def ranked(question: Question) -> list[str]:
        found = knowledge.find(site, question.text, question.earlier)
        return ["\n".join((one.title, one.heading, one.text)) for one in found.passages]

    return ranked


class Result(NamedTuple):
    question: Question
    shares: bool  # a word with its answer
    places: dict[str, int]  # by ranking: the place of its answer, 0 if it is not found
    admitted: bool  # the guide says that it does not know


def ask_site(path: Path) -> Iterator[Result]:
    """Ask all questions of a site, of every ranking."""
    pages, questions = read_site(path)
    texts = [
        "\n".join((page.title, *passage))
        for page in pages
        for passage in lf.split_sections(page.sections)
    ]
    marked = (SIGNS.sub(lambda m: f"{m[0]} {m.lastgroup} ", text) for text in texts)
    with (
        contextlib.closing(lf.Knowledge(None)) as knowledge,
        contextlib.closing(plain_index(texts)) as plain,
        contextlib.closing(plain_index(marked)) as with_signs,
    ):
        for page in pages:
            knowledge.put_page(path.stem, page, 0)
        rankings = {
            "plain bm25": plain_bm25(plain, texts),
            "version 0.1": version_0_1(with_signs, texts),
            "now": asked_of_server(knowledge, path.stem),
        }
        for question in questions:
            answers = [text for text in texts if question.answer and question.answer in text]
            assert bool(answers) == bool(question.answer), f"no passage: {question}"
            words = subjects(f"{question.earlier} {question.text}")
            places = {}
            for name, ranking in rankings.items():
                hits = [question.answer in text for text in ranking(question)]
                places[name] = hits.index(True) + 1 if question.answer and True in hits else 0
            found = knowledge.find(path.stem, question.text, question.earlier)
            reply = lf.Guide(lf.Task(question.text), {}, found, []).reply()
            shares = any(words & subjects(text) for text in answers)
            yield Result(question, shares, places, not reply["answered"])


def ask_all() -> list[Result]:
    return [one for path in sorted((HERE / "sites").glob("*.txt")) for one in ask_site(path)]


def measure(results: list[Result], ranking: str = "now") -> tuple[float, float]:
    """Return recall@3 and MRR over the answerable ones of some results."""
    places = [one.places[ranking] for one in results if one.question.answer]
    recall = sum(1 <= place <= 3 for place in places) / len(places)
    return recall, sum(1 / place for place in places if place) / len(places)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures how often the answer is found.")
    parser.add_argument("--misses", action="store_true", help="list what was not found (tuned set)")
    options = parser.parse_args()
    results = ask_all()
    groups: dict[str, Callable[[Result], bool]] = {
        "all": lambda one: True,
        "tuned on": lambda one: not one.question.held_out,
        "held out": lambda one: one.question.held_out,
        "sharing a word": lambda one: one.shares,
        "sharing none": lambda one: not one.shares,
        "follow-ups": lambda one: bool(one.question.earlier),
        **{
            site: lambda one, site=site: one.question.site == site  # type: ignore[misc]
            for site in dict.fromkeys(one.question.site for one in results)
        },
    }
    print("| questions | n | plain bm25 | version 0.1 | now | admitted |")
    print("| --- | --: | --: | --: | --: | --: |")
    for name, belongs in groups.items():
        some = [one for one in results if belongs(one)]
        count = sum(bool(one.question.answer) for one in some)
        if not count:
            continue
        cells = ["{:.2f} / {:.2f}".format(*measure(some, ranking)) for ranking in results[0].places]
        unanswerable = [one.admitted for one in some if not one.question.answer]
        admits = f"{sum(unanswerable)} of {len(unanswerable)}" if unanswerable else ""
        print(f"| {name} | {count} | {' | '.join(cells)} | {admits} |")
    for one in results if options.misses else ():
        place = one.places["now"]
        if not one.question.held_out and (
            not 1 <= place <= 3 if one.question.answer else not one.admitted
        ):
            earlier, text = one.question.earlier, one.question.text
            print(f"{one.question.site} {place} {'+' if one.shares else '-'} {earlier} >> {text}")


if __name__ == "__main__":
    main()
