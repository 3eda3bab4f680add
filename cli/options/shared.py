"""The options that commands share, each declared once: its flags, its kind, its place in the help, what it does.

Numbers are read at once, by `longspec.cli.options.parsers`. What only the engine knows (the names of drafters, caches,
devices) is checked by the engine.
"""

from __future__ import annotations

from typing import Annotated

import typer

from longspec.cli.options.parsers import number, size, whole

_PROMPT, _MODEL, _SAMPLING, _OUTPUT = "Prompt", "Model and method", "Sampling", "Output"

Prompt = Annotated[
    str | None,
    typer.Argument(metavar="PROMPT", rich_help_panel=_PROMPT, help="The prompt. - reads standard input."),
]
File = Annotated[
    list[str] | None,
    typer.Option(
        "--file", "-f", metavar="FILE", rich_help_panel=_PROMPT, help="Add a file to the prompt; may be repeated."
    ),
]
NoStdin = Annotated[
    bool,
    typer.Option(
        "--no-stdin/--stdin",
        rich_help_panel=_PROMPT,
        help="Leave standard input alone. Without it, what is piped in is read to its end.",
    ),
]
System = Annotated[
    str | None,
    typer.Option(
        "--system", "-s", metavar="TEXT", rich_help_panel=_PROMPT, help="The system message before the prompt."
    ),
]
Raw = Annotated[
    bool,
    typer.Option(
        "--raw/--no-raw",
        rich_help_panel=_PROMPT,
        help="Let the model go on from the prompt as it is, without the chat template.",
    ),
]

EachLine = Annotated[
    bool,
    typer.Option(
        "--each-line/--no-each-line",
        rich_help_panel=_PROMPT,
        help="Answer every line of standard input by itself, each answer on one line.",
    ),
]

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        rich_help_panel=_MODEL,
        help="A short name (longspec models), a folder, a .gguf file, or a Hugging Face id: owner/name, or "
        "owner/name:file.gguf. smollm2 if left out.",
    ),
]
Drafter = Annotated[
    str,
    typer.Option(
        "--drafter",
        metavar="NAME",
        rich_help_panel=_MODEL,
        help="What bets on the next tokens: auto, one by name, one over another (model+ngram), or the folder of a "
        "trained head. none is plain decoding; the text is the same.",
    ),
]
DraftModel = Annotated[
    str | None,
    typer.Option(
        "--draft-model",
        metavar="MODEL",
        rich_help_panel=_MODEL,
        help="The smaller model that the drafter `model` drafts with, named as --model is.",
    ),
]
SkipSet = Annotated[
    str | None,
    typer.Option(
        "--skip-set",
        metavar="FILE",
        rich_help_panel=_MODEL,
        help="What the drafter `skip` leaves out: a file that `longspec tune` wrote. Else what it saved for the model, "
        "and a search on the text.",
    ),
]
DraftFrom = Annotated[
    list[str] | None,
    typer.Option(
        "--draft-from",
        metavar="FILE",
        rich_help_panel=_MODEL,
        help="A text that the answer may repeat in parts, to draft from. May be repeated.",
    ),
]
Remember = Annotated[
    bool,
    typer.Option(
        "--remember/--no-remember",
        rich_help_panel=_MODEL,
        help="Draft from earlier answers too, and keep this one in the cache folder; longspec forget deletes them.",
    ),
]
Control = Annotated[
    str,
    typer.Option(
        "--control",
        metavar="NAME",
        rich_help_panel=_MODEL,
        help="How much is drafted: goodput (what brings most tokens per second, nothing included), fixed (always all), "
        "confidence (likely paths) or entropy (nothing after a hard token).",
    ),
]
NumSpeculativeTokens = Annotated[
    int | None,
    typer.Option(
        "--num-speculative-tokens",
        metavar="N",
        parser=whole(1, 64),
        rich_help_panel=_MODEL,
        help="The most tokens that are drafted in a step: 1 to 64, 15 if left out.",
    ),
]
Cache = Annotated[
    str,
    typer.Option(
        "--cache",
        metavar="NAME",
        rich_help_panel=_MODEL,
        help="How keys and values are kept: auto, or one by name. auto is dense, or with --memory what fits.",
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="NAME",
        rich_help_panel=_MODEL,
        help="auto, cpu, cuda or cuda:N. auto is the GPU where there is one.",
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="NAME",
        rich_help_panel=_MODEL,
        help="auto, fp32, bf16, or int8: weights in 8 bits, or in the fewer that a GGUF file has, nearly the same "
        "text. auto is int8 where a file holds codes, else bf16, as far as the processor has them.",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        metavar="N",
        parser=whole(1, 1024),
        rich_help_panel=_MODEL,
        help="Threads on a CPU; torch chooses if this is left out.",
    ),
]
AllRows = Annotated[
    bool,
    typer.Option(
        "--all-rows/--no-all-rows",
        rich_help_panel=_MODEL,
        help="With the caches offload and disk: read every row exactly, as dense does. Slower.",
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        parser=size,
        rich_help_panel=_MODEL,
        help="What the process may have, such as 6GiB (on a GPU: what is reserved there), or auto for what is free. "
        "The cache is chosen to fit, unless it is named; what can't fit is refused at once.",
    ),
]
Strict = Annotated[
    bool,
    typer.Option(
        "--strict/--no-strict",
        rich_help_panel=_MODEL,
        help="Make a token's bits independent of the tokens beside it in a pass: slower, and without the rare flip "
        "of a near-tie.",
    ),
]

MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens",
        "--max-tokens",
        metavar="N",
        parser=whole(1),
        rich_help_panel=_SAMPLING,
        help="End after N tokens; else at the end of the text, or of the model's context.",
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        "--temp",
        metavar="X",
        parser=number(0, 2),
        rich_help_panel=_SAMPLING,
        help="0 takes the likeliest token, 1 samples as the model is, 2 is the most. The model's own defaults hold for "
        "all of these where it has them; else it is 0.",
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        "--top-p",
        metavar="X",
        parser=number(0, 1, open_below=True),
        rich_help_panel=_SAMPLING,
        help="Sample from the likeliest tokens that hold this probability together.",
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(
        "--top-k",
        metavar="N",
        parser=whole(0),
        rich_help_panel=_SAMPLING,
        help="Sample from the N likeliest tokens; 0 is all of them.",
    ),
]
MinP = Annotated[
    float | None,
    typer.Option(
        "--min-p",
        metavar="X",
        parser=number(0, 1, open_above=True),
        rich_help_panel=_SAMPLING,
        help="Sample from tokens at least X times as likely as the likeliest.",
    ),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(
        "--repetition-penalty",
        metavar="X",
        parser=number(0, open_below=True),
        rich_help_panel=_SAMPLING,
        help="Above 1, make tokens that the text already has less likely.",
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        "--seed",
        metavar="N",
        parser=whole(),
        rich_help_panel=_SAMPLING,
        help="The same seed gives the same sampled text; 0 if left out.",
    ),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        "--stop",
        metavar="TEXT",
        rich_help_panel=_SAMPLING,
        help="End the answer right before this text; may be repeated.",
    ),
]

PromptCache = Annotated[
    str | None,
    typer.Option(
        "--prompt-cache",
        metavar="FILE",
        rich_help_panel=_OUTPUT,
        help="Keep what was read of the prompt in FILE, and begin with it the next time.",
    ),
]
OutputFile = Annotated[
    str | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        rich_help_panel=_OUTPUT,
        help="Write the answer to FILE, which is there when it is whole; until then it is FILE.part.",
    ),
]
NoServer = Annotated[
    bool,
    typer.Option(
        "--no-server/--server",
        rich_help_panel=_MODEL,
        help="Load the model here, also where a `longspec serve` with these settings is up.",
    ),
]
NoStream = Annotated[
    bool,
    typer.Option(
        "--no-stream/--stream",
        rich_help_panel=_OUTPUT,
        help="Print the answer when it is whole.",
    ),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json/--no-json",
        rich_help_panel=_OUTPUT,
        help="Print one line of JSON.",
    ),
]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet/--no-quiet",
        "-q",
        rich_help_panel=_OUTPUT,
        help="Nothing but errors on stderr.",
    ),
]
Stats = Annotated[
    bool,
    typer.Option(
        "--stats/--no-stats",
        rich_help_panel=_OUTPUT,
        help="A line of statistics on stderr, after the answer.",
    ),
]
