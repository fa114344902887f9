"""The output of ``vlscale inspect`` for people: tables and lines. What stores hold is escaped, never interpreted."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from vlscale.report.lengths import histogram_table, quantile_table

_MOST_REGIONS = 12
_REGION_WIDTH = 78
_MOST_CHARACTERS = 2000
_MOST_EXTRA = 300
_ROLES = {
    "visual": "regions are masked; the caption, if there is one, is visible",
    "bidirectional": "spans of words are masked; the image, if there is one, is visible",
    "seq2seq": "fragments of the text are generated; the image, if there is one, is visible",
    "pair": "image and caption together",
    "positive": "the image with a rewritten caption that says the same",
    "negative": "the image with a rewritten caption that is not true",
    "image": "a pair's image alone",
    "text": "a pair's caption alone",
    "retrieved_image": "an image like the pair's, alone",
    "retrieved_text": "a text like the caption, alone",
}
_STORE_NAMES = {"texts": "texts", "images": "images", "classes": "regions"}


def show(found: Mapping[str, Any], console: Console) -> None:
    """Print what :func:`vlscale.report.inspect.run` has found."""
    if "stores" in found:
        _show_stores(found, console)
        block = "█" if console.encoding.startswith("utf") else "#"
        lengths = found["lengths"]
        if any(one["count"] for one in lengths.values()):
            console.print(quantile_table(lengths))
        for name, described in lengths.items():
            if described["count"]:
                console.print(histogram_table(name, described, block))
    if "plan" in found:
        _show_plan(found["plan"], console)
    shown: set[int] = set()
    for row in found.get("rows", ()):
        _show_row(row, console, shown)
    if "png" in found:
        _line(console, f"drawn: {found['png']}")
    if "verify" in found:
        _show_verify(found["verify"], console)


def printable(value: Any, most: int = _MOST_CHARACTERS) -> str:
    """Return text from a store so that a terminal shows it and obeys none of it: control characters are escaped."""
    text = str(value)
    if len(text) > most:
        text = f"{text[:most]} ... ({len(text)} characters)"
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def size_of(count: float) -> str:
    """Return bytes for people, in powers of 1000: ``604.8 kB``."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"


def _line(console: Console, text: str, style: str = "") -> None:
    console.print(Text(text, style), soft_wrap=True)


def _table(*columns: str) -> Table:
    """A table; ``>`` behind a name puts a column to the right, ``~`` lets it fold."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in columns:
        side: JustifyMethod = "right" if name.endswith(">") else "left"
        table.add_column(name.rstrip(">~"), justify=side, no_wrap=not name.endswith("~"), overflow="fold")
    return table


def _show_stores(found: Mapping[str, Any], console: Console) -> None:
    _line(console, printable(found["path"]), "bold")
    if found["fingerprint"]:
        _line(console, f"fingerprint {found['fingerprint']}")
    table = _table("store", "rows>", "shards>", "size>", "content~")
    schema = _table("store", "column~", "encoding~")
    for kind, store in found["stores"].items():
        table.add_row(
            kind, f"{store['rows']:,}", f"{store['shards']:,}", size_of(store["bytes"]), Text(_content(kind, store))
        )
        for column, encoding in store["columns"].items():
            schema.add_row(kind, Text(column), Text(encoding))
    console.print(table)
    for kind, store in found["stores"].items():
        if store["meta"].get("source"):
            _line(console, f"source of the {kind}: {printable(store['meta']['source'])}")
        if store["compressed_bytes"]:
            _line(console, f"{kind}: compressed to {size_of(store['compressed_bytes'])}")
        if store["shards_without_hash"]:
            _line(console, f"{kind}: {store['shards_without_hash']} shards have no hash in index.json", "yellow")
    if "vocabulary" in found:
        _line(console, _vocabulary(found["vocabulary"]))
    references = [f"{found[key]:,} {key.replace('_', ' ')}" for key in
                  ("texts_without_image", "images_without_text") if key in found]  # fmt: skip
    if references:
        _line(console, ", ".join(references))
    console.print(schema)


def _content(kind: str, store: Mapping[str, Any]) -> str:
    meta = store["meta"]
    if kind == "texts":
        return f"{store['tokens']:,} word pieces" + ("" if store["tokenizer"] else ", no tokenizer.json")
    if kind == "classes":
        names = "named" if store["class_names"] else "without names"
        return f"{meta['dtype']} [{meta['num_classes']}] per region, classes {names}"
    if kind in ("units", "rewrites", "retrieved"):
        return _beside(kind, store)
    text = f"{store['regions']:,} regions, {meta['feature_dtype']} [{meta['feature_dim']}] each"
    codec = meta.get("feature_codec", "none")
    if codec != "none" and store["raw_feature_bytes"]:
        text += f", codec {codec}: {store['bytes'] / store['raw_feature_bytes']:.2f} of the features' raw size"
    known = {"kind", "version", "feature_dim", "feature_dtype", "feature_codec", "source"}
    rest = {key: value for key, value in meta.items() if key not in known and value is not None}
    return text + "".join(f", {key} {printable(value)}" for key, value in rest.items())


def _beside(kind: str, store: Mapping[str, Any]) -> str:
    """What a store beside the texts holds."""
    per = max(store["rows"], 1)
    if kind == "units":
        parser = printable(store["meta"]["parser"])
        return f"{store['units']:,} units ({store['units'] / per:.1f} per text), parser {parser}"
    if kind == "rewrites":
        share = store["positive_views"] / max(store["views"], 1)
        return f"{store['views']:,} rewritten captions ({store['views'] / per:.1f} per text), {share:.0%} say the same"
    found = []
    for what in ("images", "texts"):
        collection = store["meta"][f"{what[:-1]}_collection"]
        if collection is not None:
            of = f"of {collection['rows']:,} ({collection['digest'][:12]})"
            found.append(f"{store[what] / per:.1f} {what} per text, {of}")
    return "; ".join(found)


def _vocabulary(vocabulary: Mapping[str, Any]) -> str:
    special = ", ".join(f"{printable(token)} {index}" for index, token in vocabulary["special"].values())
    low, high = vocabulary["random_range"]
    return (
        f"vocabulary: {vocabulary['size']:,} word pieces, fingerprint {vocabulary['fingerprint'][:16]}; {special}; "
        f"random words from {low} to {high - 1}"
    )


def _show_plan(plan: Mapping[str, Any], console: Console) -> None:
    table = _table("plan", "value>", "meaning~")
    spread, looked = plan["micro_batches"], plan["steps"]
    part = "the whole pass" if plan["examples"] >= plan["texts"] else f"the first {looked:,} steps"
    largest = "largest unit with its views, at most" if "mixed" in plan else "longest example"
    rows = [
        ("processes x accumulation", f"{plan['world_size']} x {plan['accumulation']}", "micro-batches of a step"),
        ("budget", f"{plan['micro_batch_tokens']:,}", f"tokens per micro-batch; {largest} {plan['longest']:,}"),
        ("global batch", f"{plan['global_batch_tokens']:,}", "tokens per step at most"),
        (
            "units in a pass" if "mixed" in plan else "texts in a pass",
            f"{plan['texts']:,}",
            f"{plan['left_out']:,} left out as too long",
        ),
        ("steps per pass", f"{plan['steps_per_pass']:,.1f}", f"figures below: {part}"),
        ("fill", f"{plan['fill']:.2%}", "what the budget counts / (micro-batches x budget)"),
        (
            "padding",
            f"{plan['padding']:.2%}",
            f"{plan['mode']}; padded to the longest: {plan['padding_if_padded']:.1%}",
        ),
        (
            "straggler factor",
            f"{plan['straggler_mean']:.4f}",
            f"busiest rank / mean; worst step {plan['straggler_most']:.4f}",
        ),
        ("tokens per micro-batch", f"{spread['median']:,.0f}", f"median; {spread['least']:,} to {spread['most']:,}"),
        ("empty micro-batches", f"{plan['empty']:,}", f"of {spread['count'] + plan['empty']:,}"),
    ]
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if "mixed" in plan:
        _show_mixed(plan["mixed"], console)
    if plan["advice"]:
        _line(console, plan["advice"])


def _show_mixed(mixed: Mapping[str, Any], console: Console) -> None:
    """What a unified step is made of."""
    units = ", ".join(f"{count:,.1f} of {printable(name)}" for name, count in mixed["units"].items())
    _line(console, f"units of a step: {units}; {mixed['rows']:,.1f} rows with all views")
    table = _table("rows", "per step>", "of the tokens>", "what they are~")
    for role, found in mixed["roles"].items():
        table.add_row(role.replace("_", " "), f"{found['rows']:,.1f}", f"{found['share']:.1%}", _ROLES[role])
    console.print(table)


def _show_row(row: Mapping[str, Any], console: Console, shown: set[int]) -> None:
    """Print one row; an image that ``shown`` holds has been printed with an earlier text."""
    console.print()
    if "text" in row:
        _show_text(row, console)
        for image in row["images"]:
            _show_image(image, console, shown)
    elif "regions" in row:
        _show_image(row, console, shown)
    else:
        _line(console, f"class row {row['row']}: sum {row['sum']:.4f}", "bold")
        _line(console, f"  {_classes(row['classes'])}")


def _show_text(row: Mapping[str, Any], console: Console) -> None:
    _line(console, f"text row {row['row']}: {printable(row['id'])}", "bold")
    quotes = "“”" if console.encoding.startswith("utf") else '""'
    _line(console, f"  {quotes[0]}{printable(row['text'])}{quotes[1]}")
    pairs = zip(row["tokens"], row["input_ids"], strict=True)
    words = f"{len(row['tokens'])} word pieces: {' '.join(printable(f'{token}:{index}') for token, index in pairs)}"
    _line(console, textwrap.fill(words, console.width - 2, initial_indent="  ", subsequent_indent="    "))
    if "segments" in row:
        segments = ", ".join(f"type {kind}: {size} word pieces" for kind, size in row["segments"])
        _line(console, f"  {len(row['segments'])} segments: {segments}")
    if "units" in row:
        units = " | ".join(" ".join(printable(token) for token in unit) for unit in row["units"])
        _line(console, f"  {len(row['units'])} units: {units}")
    for text, positive in row.get("rewrites", ()):
        _line(console, f"  {'says the same' if positive else 'not true'}: {printable(text)}")
    for kind, rows in row.get("retrieved", {}).items():
        _line(console, f"  {kind} like it: rows {', '.join(map(str, rows)) or 'none'}")
    if row["extra"]:
        _line(console, f"  extra: {printable(row['extra'], _MOST_EXTRA)}")


def _show_image(image: Mapping[str, Any], console: Console, shown: set[int]) -> None:
    if "regions" not in image:
        _line(console, f"  image {printable(image['id'])} (its store is not at hand)")
        return
    if image["row"] in shown:
        _line(console, f"  image row {image['row']}: {printable(image['id'])}, shown above")
        return
    shown.add(image["row"])
    size = f"{image['width']} x {image['height']} pixels, {image['count']} regions"
    extra = f", extra {printable(image['extra'], _MOST_EXTRA)}" if image["extra"] else ""
    _line(console, f"  image row {image['row']}: {printable(image['id'])}, {size}{extra}")
    table = _table("region>", "box (x1 y1 x2 y2)", "conf>", "mean>", "std>", "least>", "most>", "zeros>")
    if any("classes" in region for region in image["regions"]):
        left = max(12, console.width - _REGION_WIDTH)  # a wider one would squeeze the numbers
        table.add_column("classes", no_wrap=True, overflow="ellipsis", max_width=left)
    for number, region in enumerate(image["regions"][:_MOST_REGIONS]):
        features = region["features"]
        box = " ".join(f"{side:.3f}" for side in region["box"])
        cells = [str(number), box, f"{region['conf']:.3f}"]
        cells += [f"{features[name]:.3g}" for name in ("mean", "std", "least", "most")]
        classes = [Text(_classes(region["classes"]))] if "classes" in region else []
        table.add_row(*cells, f"{features['zeros']:.0%}", *classes)
    console.print(table)
    left = image["count"] - min(len(image["regions"]), _MOST_REGIONS)
    if left:
        _line(console, f"  ... and {left} more regions")


def _classes(classes: list[list[Any]]) -> str:
    return ", ".join(f"{index if name is None else printable(name)} {prob:.2f}" for index, name, prob in classes)


def _show_verify(report: Mapping[str, Any], console: Console) -> None:
    for problem in report["problems"]:
        _line(console, printable(problem), "red")
    if report["found"] > len(report["problems"]):
        _line(console, f"... and {report['found'] - len(report['problems'])} more problems")
    for kind in report["packed"]:
        _line(console, f"{kind}: only compressed shards are there; they were hashed, their content was not looked at")
    amount = f"{report['stores']} stores, {report['shards']} shards, {size_of(report['bytes'])}"
    if report["what"] == "rows":
        amount += f", {report['rows']:,} rows"
    verdict = "no damage" if not report["found"] else f"{report['found']} problems"
    _line(console, f"verified {amount}: {verdict}", "bold red" if report["found"] else "bold green")
