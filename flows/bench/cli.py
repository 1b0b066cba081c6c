"""``everloop bench``: measure; each figure stands beside what it is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from infra import report
from infra.report import JsonPath
from infra.settings import load

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)


@app.command()
def serving(
    runs: Annotated[int, typer.Option("--runs", min=1, help="Runs of each variant, interleaved.")] = 5,
    first_tokens: Annotated[int, typer.Option("--first-tokens", min=20, help="Requests of each, in turn.")] = 200,
    seconds: Annotated[
        float, typer.Option("--seconds", min=2, help="Length of the load before a null engine.")
    ] = 20.0,
    json_path: JsonPath = None,
) -> None:
    """The running stack: base, gateway, one adapter, four mixed; and what the gateway costs by itself."""
    from flows.bench import gateway
    from flows.bench.serving import serving as measure

    settings = load()
    result = measure(settings, runs)
    result |= {"first_token": (first := gateway.first_tokens(settings, first_tokens))}
    result |= {"null_engine": (null := gateway.null_engine(seconds))}
    result |= {name: first[name] for name in ("ttft_added_p50_ms", "ttft_added_p99_ms")}
    result["null_engine_rps"] = null["null_engine_rps"]
    report.write_json(json_path, result)
    if json_path != "-":
        table = Table("16 concurrent streams", "tokens/s (median)", "ratio", "runs", box=None)
        for variant, row in result["variants"].items():
            ratio = f"{row['ratio']:.2f} of {row['of']}" if row["of"] else ""
            table.add_row(variant, f"{row['tokens_per_s']:.0f}", ratio, str(row["runs"]))
        report.output.print(table)
        report.print_fields(None, {"first_token": first, "null_engine": null})


@app.command()
def tools(
    requests: Annotated[int, typer.Option("--requests", min=20, help="Answers of each, in turn.")] = 200,
    json_path: JsonPath = None,
) -> None:
    """What a step with a tool costs beside engine and tool, before an engine that answers at once."""
    from flows.bench.tools import measure

    report.print_fields(json_path, measure(requests))


@app.command()
def log(
    seconds: Annotated[float, typer.Option("--seconds", min=1, help="Length of each load.")] = 15.0,
    json_path: JsonPath = None,
) -> None:
    """Signals per second from HTTP to their effect, and the relay beside a plain producer."""
    from flows.bench.log import measure

    report.print_fields(json_path, measure(seconds))


@app.command()
def faults(
    kills: Annotated[int, typer.Option("--kills", min=1, help="How many parts are killed.")] = 50,
    seed: Annotated[int, typer.Option("--seed", help="Of the order of the kills.")] = 0,
    json_path: JsonPath = None,
) -> None:
    """Kill parts at random under load; exit status 0 only if nothing was lost or counted twice."""
    from flows.bench.faults import storm

    result = storm(kills, seed)
    report.print_fields(json_path, result)
    if result["lost"] or result["counted_twice"] or not result["reward_state_equal"]:
        raise typer.Exit(1)


@app.command()
def reward(
    pairs: Annotated[
        Path | None, typer.Option("--pairs", help="A gzip'd JSONL of {chosen, rejected} transcripts.")
    ] = None,
    stack: Annotated[bool, typer.Option(help="Also start the log's parts, for replay and latency.")] = True,
    json_path: JsonPath = None,
) -> None:
    """How well the reward model learns, how fast, and what coordinated raters can do to it."""
    from flows.bench.reward import measure

    report.print_fields(json_path, measure(pairs, with_stack=stack))


@app.command()
def backbone(
    pairs: Annotated[Path, typer.Option("--pairs", help="A gzip'd JSONL of {chosen, rejected} transcripts.")],
    max_pairs: Annotated[int, typer.Option("--max-pairs", min=8, help="Newest pairs trained on.")] = 320,
    max_minutes: Annotated[float, typer.Option("--max-minutes", min=0.1, help="Longest training.")] = 10.0,
    epochs: Annotated[float, typer.Option("--epochs", min=0.1, help="Passes over them.")] = 1.0,
    json_path: JsonPath = None,
) -> None:
    """Train a reward backbone on older pairs of a file, and judge it on the newest tenth."""
    from flows.bench.backbone import measure
    from reward.backbone_config import BackboneConfig

    config = BackboneConfig(max_pairs=max_pairs, max_minutes=max_minutes, epochs=epochs)
    report.print_fields(json_path, measure(pairs, config))


@app.command()
def training(
    rows: Annotated[int, typer.Option("--rows", min=8, help="Comparisons that each run trains on.")] = 32,
    runs: Annotated[int, typer.Option("--runs", min=1, help="Runs of each, in turns.")] = 3,
    json_path: JsonPath = None,
) -> None:
    """Seconds and memory of a platform run beside a bare TRL script, same data and steps (DPO)."""
    from flows.bench.training import measure

    report.print_fields(json_path, measure(rows, runs))


@app.command()
def learning(
    only: Annotated[
        list[str] | None, typer.Option("--only", help="A preference; may be given again. All if unset.")
    ] = None,
    nights: Annotated[int, typer.Option("--nights", min=1, max=30)] = 3,
    rated: Annotated[int, typer.Option("--rated", min=40, max=400, help="Rated answers a day.")] = 400,
    measured: Annotated[int, typer.Option("--measured", min=20, help="Held-out answers.")] = 90,
    quarter: Annotated[bool, typer.Option(help="Also play a night after a quarter of the ratings.")] = True,
    config: Annotated[
        Path | None, typer.Option("--config", help="TOML of the nights; the defaults if unset.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    lives: Annotated[
        Path | None, typer.Option("--lives", help="Keep finished lives here; go on with those that are missing.")
    ] = None,
    json_path: JsonPath = None,
) -> None:
    """Play hidden preferences against the public API: what people gain a night, and from how few ratings."""
    from flows.bench.learning import learning as measure
    from infra.stack.cli import stop_on_sigterm
    from trainer.config import read_toml

    stop_on_sigterm()
    settings = read_toml(config) if config else {}
    report.print_fields(
        json_path, measure(only or [], nights, rated, measured, settings, seed, lives, quarter=quarter)
    )


@app.command()
def recipes(
    candidates: Annotated[list[str], typer.Argument(help="Names of recipes, or TOML files.")],
    preference: Annotated[str, typer.Option("--preference", help="What people like.")] = "short",
    rated: Annotated[int, typer.Option("--rated", min=40, max=400, help="Rated answers.")] = 400,
    measured: Annotated[int, typer.Option("--measured", min=20, help="Held-out answers.")] = 90,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    json_path: JsonPath = None,
) -> None:
    """Let recipes train on one day's signals, each from the base model, and show what each gains a minute."""
    from flows.bench.learning import recipes as measure
    from infra.stack.cli import stop_on_sigterm

    stop_on_sigterm()
    report.print_fields(json_path, measure(preference, candidates, rated, measured, seed))


@app.command()
def overoptimise(
    rated: Annotated[int, typer.Option("--rated", min=40, max=400, help="Rated answers.")] = 300,
    measured: Annotated[int, typer.Option("--measured", min=20, help="Held-out answers.")] = 90,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    json_path: JsonPath = None,
) -> None:
    """Follow comparisons too far, without the guards and with them; what people like is the measure."""
    from flows.bench.overoptimise import measure
    from infra.stack.cli import stop_on_sigterm

    stop_on_sigterm()
    report.print_fields(json_path, measure(rated, measured, seed))


@app.command()
def rollouts(
    seconds: Annotated[float, typer.Option("--seconds", min=2, help="Length of each load.")] = 20.0,
    runs: Annotated[int, typer.Option("--runs", min=1, help="Of each, in turns.")] = 3,
    json_path: JsonPath = None,
) -> None:
    """What a person's answer costs while a run samples: alone, beside rollouts as they are, and unthrottled."""
    from flows.bench.rollouts import measure
    from infra.stack.cli import stop_on_sigterm

    stop_on_sigterm()
    report.print_fields(json_path, measure(seconds, runs))


@app.command()
def canary(
    canaries: Annotated[int, typer.Option("--canaries", min=20, help="Simulated canaries a row.")] = 2000,
    pairs: Annotated[int, typer.Option("--pairs", min=50, help="Most pairs of votes in each.")] = 4000,
    alpha: Annotated[float, typer.Option("--alpha", min=0.001, max=0.5)] = 0.05,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    json_path: JsonPath = None,
) -> None:
    """How often canaries err with a look after every vote, and after how many pairs of votes they decide."""
    from flows.bench.canary import measure

    report.print_fields(json_path, measure(canaries, pairs, alpha, seed))


@app.command()
def swap(
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Promotions, each rolled back.")] = 5,
    json_path: JsonPath = None,
) -> None:
    """Change the champion and put it back under eight streams: how soon it is seen, and whether a request fails."""
    from flows.bench.swap import measure
    from infra.stack.cli import stop_on_sigterm

    stop_on_sigterm()
    report.print_fields(json_path, measure(rounds))


@app.command()
def soak(
    minutes: Annotated[float, typer.Option("--minutes", min=1, help="Length of the load.")] = 30.0,
    json_path: JsonPath = None,
) -> None:
    """All at once for a while: chat, votes, pages, a night, a canary, a rollback; nothing may fail or grow."""
    from flows.bench.soak import MAX_LAG_S, measure
    from infra.stack.cli import stop_on_sigterm

    stop_on_sigterm()
    result = measure(minutes)
    report.write_json(json_path, result)
    if json_path != "-":
        table = Table("part", "memory (MiB)", "slope (MiB/min)", "verdict", "files", "connections", box=None)
        for name, part in result["parts"].items():
            table.add_row(
                name,
                f"{part['memory_start_mib']:.0f} to {part['memory_end_mib']:.0f}",
                f"{part['slope_mib_per_min']:+.2f} ± {part['slope_error']:.2f}",
                part["verdict"],
                f"{part['files_start']:.0f} to {part['files_end']:.0f}",
                f"{part['connections_start']:.0f} to {part['connections_end']:.0f}",
            )
        report.output.print(table)
        report.print_fields(None, {name: value for name, value in result.items() if name != "parts"})
    if result["errors"] or result["leaks"] or result["lag_s"] > MAX_LAG_S:
        raise typer.Exit(1)


@app.command()
def memory(
    conversations: Annotated[
        Path | None,
        typer.Option("--conversations", help="JSON with conversations and questions; our own, held out, if unset."),
    ] = None,
    which: Annotated[
        str, typer.Option("--set", help="Without a file: held_out, or tune, on which weights were chosen.")
    ] = "held_out",
    num: Annotated[int, typer.Option("--num", min=1, help="Without a file: how many conversations.")] = 16,
    times: Annotated[bool, typer.Option(help="Also how long a context takes, out of PostgreSQL.")] = True,
    encoder: Annotated[bool, typer.Option(help="With `memory_encoder` on: sentences are read by a model.")] = False,
    json_path: JsonPath = None,
) -> None:
    """What was said and is asked for: how much of it is in the context, beside simpler ways, and how soon."""
    from flows.bench.memory import measure

    report.print_fields(json_path, measure(load(), conversations, which, num, with_times=times, encoder=encoder))


@app.command("memory-answers")
def memory_answers(
    num: Annotated[int, typer.Option("--num", min=1, help="How many questions.")] = 48,
    budget: Annotated[int, typer.Option("--budget", min=64, help="Tokens of a prompt.")] = 512,
    json_path: JsonPath = None,
) -> None:
    """Whether memory helps: the share of answers of the base model that have what was said long before."""
    from flows.bench.memory_answers import answers

    report.print_fields(json_path, answers(num, budget))
