"""`freshet evaluate` in a terminal: options, the table and what it cannot show.

The work is done in compare.py for logs of bandits and in own_log.py for one's own; verbs about one's own log are in
own_verbs.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infra.terminal import LEARN, Json, console, fail, show_json

if TYPE_CHECKING:
    from rich.console import Console

NAMES = {
    "replay": "replay", "ips": "IPS", "snips": "SNIPS", "clipped": "clipped IPS", "dr": "doubly robust",
}  # fmt: skip


def evaluate(
    log: Annotated[
        Path,
        typer.Option(help="Folder that `freshet export` wrote, or of Open Bandit: POLICY-CAMPAIGN.csv(.gz)."),
    ],
    policy: Annotated[
        Path | None,
        typer.Option(help="Changed settings (TOML) to evaluate on an export.", show_default=False),
    ] = None,
    logged: Annotated[
        Path | None,
        typer.Option(help="Settings (TOML) the export was made under; default this shell's.", show_default=False),
    ] = None,
    source: Annotated[str, typer.Option("--from", help="Open Bandit: policy whose log is used.")] = "",
    target: Annotated[
        str, typer.Option("--to", help="Open Bandit: policy that is evaluated; its own log is the check.")
    ] = "",
    campaign: Annotated[str, typer.Option(help="Campaign of the files: men, women, all.")] = "men",
    clip: Annotated[
        float | None,
        typer.Option(help="Largest weight of clipped IPS; default: root of the rows.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap, of folds and of replay.", min=0)] = 1,
    as_json: Json = False,
) -> None:
    """What would another policy have earned? Estimate it from a log, of your own or of Open Bandit.

      freshet export slates events items --out log
      freshet evaluate --log log --policy candidate.toml       # candidate.toml: epsilon = 0.1

    Your own log is replayed through the very code under the settings of the file; each shown position weighs as much
    as these settings make the items down to it likelier than the log did (`cascade`: what a position earns is taken as
    independent of what stands below it; `slate` assumes nothing and needs far more slates). `difference` is what
    they would have earned minus what the log earned, on the same rows, with a 95 % interval over users: `better`,
    `worse`, `no difference shown`, or `no overlap`, where the log cannot say. A greedy log never can: it shows nothing
    else. Rewards are those of the export. What a lookup excluded or filtered is not logged.

    Open Bandit: from the log of one policy, with the probability of everything it showed, this estimates the click
    rate of another, which is taken to show each item at each position as often as its own log does. That log then says
    what the answer should have been; `difference` is estimate minus truth, with the noise of both logs.

      freshet evaluate --log open-bandit --campaign men --from random --to bts
      freshet evaluate --log open-bandit --campaign women --from bts --to random --json

    agrees      the 95 % interval of the difference (SNIPS) holds 0: not proof that it is 0
    disagrees   it does not
    no overlap  fewer than 500 effective rows: the log cannot say, and no number is given

    Those intervals are for rare clicks (`freshet bench ope` measures how often they hold the truth). So few show
    little: of 10,000 rows with 46 to 69 clicks each side, a click rate must be off by 70 % (men, random to bts) to
    120 % (men, bts to random) before four of five such pairs of logs show it; `detectable` says it for those at hand.
    """
    if policy is not None:
        if source or target or clip is not None or campaign != "men":
            fail(
                "--policy: goes with --log, --seed and --json; --from, --to, --campaign, --clip are Open Bandit's",
                2,
            )
        from infra.evaluating.own_verbs import evaluate_own

        evaluate_own(log, policy, logged, seed, as_json=as_json)
        return
    if logged is not None or not source or not target:
        fail("expected --policy FILE with an export, or --from and --to with Open Bandit files, got neither", 2)
    from infra.evaluating.compare import compare
    from infra.evaluating.open_bandit import read_bandit_log

    if source == target:
        fail(f"--to: expected another policy than --from, got {target!r} twice; a log agrees with itself", 2)
    if clip is not None and not clip > 0.0:
        fail(f"--clip: expected a weight above 0, got {clip:g}", 2)
    report = compare(read_bandit_log(log, source, campaign), read_bandit_log(log, target, campaign), seed=seed,
                     clip=clip)  # fmt: skip
    report = {"campaign": campaign, **report}
    if as_json:
        show_json(report)
    else:
        show(report, console())


def show(report: dict[str, Any], screen: Console) -> None:
    """Say what each estimator says, what the truth was, and what so few clicks can show."""
    from rich.table import Table

    before, after, own = report["logged"]["from"], report["logged"]["to"], report["on_policy"]
    screen.print(
        f"[bold]{report['campaign']}[/]: {report['to']} evaluated on the log of {report['from']}"
        f" ({before['rows']:,} rows, {before['clicks']:,} clicks); its own log: {after['rows']:,} rows,"
        f" {after['clicks']:,} clicks"
    )
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("click rate", "", "95 %", "minus its own", "95 %"):
        table.add_column(name, justify="left" if name == "click rate" else "right", no_wrap=True)
    for key, title in NAMES.items():
        row, apart = report["estimates"][key], report["difference"][key]
        mark = " *" if key == report["headline"] else ""
        if row["value"] is not None:
            table.add_row(title + mark, f"{row['value']:.3%}", _ends(row), f"{apart['value']:+.3%}", _ends(apart, "+"))
    table.add_row(f"{report['to']}'s own log", f"{own['value']:.3%}", _ends(own), "", "")
    screen.print(table)
    for key, title in NAMES.items():
        if report["estimates"][key]["value"] is None and report["verdict"] != "no overlap":
            screen.print(f"[dim]{title}: no number, {report['estimates'][key]['reason']}")
    seen = report["overlap"]
    screen.print(
        f"[dim]effective rows {report['effective_sample_size']:,.0f}; largest weight {seen['largest_weight']:,.1f};"
        f" clipped at {seen['clip']:g}, too low by at most {seen['clipped']:.1%} of all weight"
    )
    head = report["estimates"][report["headline"]]
    if head["value"] is not None and head["cautious"][1] > 1.5 * head["high"]:
        screen.print(
            f"[yellow]were what the log hardly shows clicked much more than the rest, these rows would not tell: SNIPS"
            f" is then only known to be at most {head['cautious'][1]:.3%}"
        )
    for warning in seen["warnings"]:
        screen.print(f"[yellow]{warning}")
    colour = {"agrees": "green", "disagrees": "red"}.get(report["verdict"], "yellow")
    screen.print(f"[{colour}]{report['verdict']}[/] {_meaning(report)}")


def _meaning(report: dict[str, Any]) -> str:
    if report["verdict"] == "no overlap":
        return "(no number is given: more rows, or a log that explores more, would be needed)"
    least, own = report["detectable"], report["on_policy"]["value"]
    if least["relative"] is None:
        return "(no clicks: nothing can be told apart)"
    return (
        f"(*). With so few clicks only a true difference of {least['difference']:.3%}, {least['relative']:.0%} of"
        f" {own:.3%}, would be found in four of five such pairs of logs; smaller ones look like agreement."
    )


def _ends(row: dict[str, Any], sign: str = "") -> str:
    return f"{row['low']:{sign}.3%} .. {row['high']:{sign}.3%}"


def add(app: typer.Typer) -> None:
    """Add the verbs of this package to the console command."""
    from infra.evaluating import own_verbs

    app.command("evaluate", rich_help_panel=LEARN)(evaluate)
    own_verbs.add(app)
