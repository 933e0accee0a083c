"""What a bench report says in words: is it worth it, from which size on, at what loss, and under which conditions."""

import json
import math
from collections.abc import Mapping
from statistics import median

from pictures import LABELS
from results import Results, crossover, mechanisms_of, resolutions, row_of

# Within so much of 1 a ratio is called a tie: two runs on an idle machine may differ by 5 %.
TIE = 0.05
# A spread of the latencies, relative to their median, above which the report warns.
RESTLESS = 0.15
DEFINITIONS = (
    "Every ratio is a quotient of speeds, larger is faster; it is taken within a round, and the median over rounds is "
    "shown, beside it that median's 95 % confidence interval. All cases of a resolution are timed in one process, once "
    "a round each, every round beginning with another one; they share weights and input.",
    "`none` passes the values through: the same network without any mixing of tokens, which no mechanism can beat.",
    "GMACs are multiply-accumulates of matrix products in 1e9 for one image, by PyTorch's counter. Memory is that of a "
    "forward pass in a process of its own, run eagerly.",
    "The gate compares each mechanism on the very q, k and v of the case with its dense reference in float64, before "
    "the clock starts; beside it stands the relative error. Without a green gate there is no speed.",
)


def number(value: float | None, form: str = ",.2f") -> str:
    return "-" if value is None else format(value, form)


def short_name(mechanism: str) -> str:
    return LABELS.get(mechanism, mechanism)


def swept(results: Results) -> dict[str, tuple[str, float | None]]:
    """Kind and tokens of each linear mechanism's crossover in the whole network, from the sweep."""
    rows = [row for row in results.crossover if row.scope == "network" and row.mechanism not in ("softmax", "none")]
    return {row.mechanism: (row.kind, row.tokens) for row in rows}


def interpolated(results: Results) -> dict[str, tuple[str, float | None]]:
    """The same between the resolutions measured, of those of which there is more to say than ``unknown``."""
    points: dict[str, list[tuple[int, float | None]]] = {mechanism: [] for mechanism in mechanisms_of(results)}
    for row in results.rows:
        if row.mechanism in points and row.tokens:
            points[row.mechanism].append((row.tokens, row.ratio_vs_softmax))
    found = {mechanism: crossover(of_mechanism) for mechanism, of_mechanism in points.items()}
    return {mechanism: where for mechanism, where in found.items() if where[0] != "unknown"}


def verdict(results: Results) -> str:
    """One sentence about vanilla linear attention, or about the first mechanism where it was not measured."""
    compared = {row.mechanism for row in results.rows if row.ratio_vs_softmax}
    timed = [mechanism for mechanism in mechanisms_of(results) if mechanism in compared]
    if not timed:
        return "No linear mechanism was compared with softmax in this run."
    mechanism = "linear" if "linear" in timed else timed[0]
    kind, tokens = (interpolated(results) | swept(results)).get(mechanism, ("unknown", None))
    best = max(row.ratio_vs_softmax or 0 for row in results.rows if row.mechanism == mechanism)
    said = {
        "within": f"In speed yes, {crossing(results, kind, tokens)} on; below that softmax is the faster one",
        "always": "In speed yes, at every size measured",
        "never": "In speed no, at no size measured",
    }.get(kind, "That was not measured")
    doubt = " But the machine was not idle: measure again." if _noise(results) else ""
    return f"{said} ({short_name(mechanism)}, whole network; at best {best:.2f} times softmax's speed).{doubt}"


def answer(results: Results) -> list[str]:
    """Is it worth it, from which size on, and at what loss: in plain sentences."""
    sentences = [_noise(results), *(_worth(results, res) for res in resolutions(results))]
    sentences += [_from_which_size(results), _memory_answer(results), _loss(results)]
    failed = [row for row in results.rows if row.error is not None]
    if failed:
        said = ", ".join(f"{row.mechanism} at {row.res} px ({row.error_kind})" for row in failed)
        sentences.append(f"Without a result: {said}.")
    return [sentence for sentence in sentences if sentence]


def _noise(results: Results) -> str:
    """A warning where the machine was too restless for what the reader wants to conclude."""
    spreads = [
        (row.latency_ms_p80 - row.latency_ms_p20) / row.latency_ms_p50 for row in results.rows if row.latency_ms_p50
    ]
    beaten = [row for row in results.rows if row.ratio_vs_none is not None and row.ratio_vs_none > 1 + TIE]
    if not spreads or (median(spreads) <= RESTLESS and not beaten):
        return ""
    said = f"from its 20th to its 80th percentile a latency spreads over {100 * median(spreads):.0f} % of its median"
    if beaten:
        said += f", and {len(beaten)} rows seem faster than a network without attention, which cannot be"
    return f"**Take these times with caution: the machine was not idle.** In the median row {said}."


def _worth(results: Results, res: int) -> str:
    timed = {m: row_of(results, m, res) for m in mechanisms_of(results)}
    ratios = {m: row.ratio_vs_softmax for m, row in timed.items() if row is not None and row.ratio_vs_softmax}
    if not ratios:
        return f"At {res} px nothing could be compared with softmax."
    tokens = next(row.tokens for row in timed.values() if row is not None)
    faster = [m for m in ratios if ratios[m] > 1 + TIE]
    slower = [m for m in ratios if ratios[m] < 1 - TIE]
    best = max(ratios, key=ratios.get)
    said = f"{len(faster)} of {len(ratios)} mechanisms are faster than softmax"
    if not faster:
        said = "no mechanism is faster than softmax" if slower else "every mechanism ties with softmax"
    elif len(faster) == len(ratios):
        said = f"all {len(ratios)} mechanisms are faster than softmax"
    said = f"**At {res} px ({tokens:,} tokens) {said}**; the fastest is {short_name(best)} at {ratios[best]:.2f} times"
    if "linear" in ratios and best != "linear":
        said += f", vanilla linear attention, AdaLA's own, is at {ratios['linear']:.2f}"
    ceiling = row_of(results, "none", res)
    if ceiling is not None and ceiling.ratio_vs_softmax:
        said += f". No mechanism could pass {ceiling.ratio_vs_softmax:.2f}: that is a network without any mixing"
    return said + "."


def _from_which_size(results: Results) -> str:
    rows = [row for row in results.crossover if row.mechanism in swept(results) and row.scope == "network"]
    if rows:
        low, high = min(row.least_tokens for row in rows), max(row.most_tokens for row in rows)
        how = f"(whole network, swept from {low:,} to {high:,} tokens)"
        return f"**From which size on** {how}: {_grouped_crossings(results, swept(results))}."
    sizes, where = resolutions(results), interpolated(results)
    if len(sizes) < 2 or not where:
        return ""
    return (
        f"**From which size on**, interpolated between the {len(sizes)} resolutions measured, {sizes[0]} to "
        f"{sizes[-1]} px (`--sweep` measures it): {_grouped_crossings(results, where)}."
    )


def _grouped_crossings(results: Results, where: Mapping[str, tuple[str, float | None]]) -> str:
    """Crossovers in order of their size, those that are everywhere or never in the range together."""
    parts = []
    for kind in ("always", "within", "never", "unknown"):
        names = [name for name in where if where[name][0] == kind]
        if kind == "within":
            names.sort(key=lambda name: where[name][1])
            parts += [f"{short_name(name)} {crossing(results, *where[name])}" for name in names]
        elif names:
            parts.append(f"{', '.join(map(short_name, names))} {crossing(results, kind, None)}")
    return "; ".join(parts)


def crossing(results: Results, kind: str, tokens: float | None) -> str:
    """A crossover in words, with the side in pixels of a square image of so many tokens."""
    if kind != "within":
        return {"always": "everywhere in the range", "never": "never in the range"}.get(kind, "not measured")
    patches = max(1.0, tokens - results.machine.get("num_prefix_tokens", 1))
    pixels = math.sqrt(patches) * results.machine.get("patch_size", [16])[0]
    return f"from about {tokens:,.0f} tokens ({pixels:,.0f} px)"


def _memory_answer(results: Results) -> str:
    if not results.rows:
        return ""
    res = resolutions(results)[-1]
    softmax, linear = row_of(results, "softmax", res), row_of(results, "linear", res)
    if softmax is None or linear is None or None in (softmax.activations_mib, linear.activations_mib):
        return ""
    how = "which builds" if softmax.sdpa_backend in ("math", "unfused") else "with a fused kernel that never builds"
    return (
        f"**Memory** at {res} px: {linear.peak_mem_mib:,.0f} MiB at the peak with vanilla linear attention, "
        f"{softmax.peak_mem_mib:,.0f} MiB with softmax ({how} the N x N matrix); of these are activations "
        f"{linear.activations_mib:,.0f} and {softmax.activations_mib:,.0f} MiB."
    )


def _loss(results: Results) -> str:
    scored = [row for row in results.accuracy if row.kept is not None and row.mechanism != "softmax"]
    if not scored:
        return "**At what loss** was not measured in this run (`--accuracy`)."
    recipe = results.machine.get("recipe", "the recipe")
    by_conversion = []
    for conversion, words in (("adala", "under AdaLA's stages"), ("native", "converted as their authors do")):
        rows = [row for row in scored if row.conversion == conversion]
        if rows:
            best, worst = (pick(rows, key=lambda row: row.kept) for pick in (max, min))
            by_conversion.append(
                f"{words} the mechanisms keep {100 * worst.kept:.1f} % ({short_name(worst.mechanism)}) to "
                f"{100 * best.kept:.1f} % ({short_name(best.mechanism)})"
            )
    teacher, seen = number(scored[0].teacher_top1), number(scored[0].images_seen, ",")
    return (
        f"**At what loss**: of the teacher's top-1 of {teacher} % on recipe {recipe}, with the same {seen} training "
        f"images each, {'; '.join(by_conversion)}. That is a small task: it ranks mechanisms, it does not predict "
        "ImageNet."
    )


def conditions(results: Results) -> list[tuple[str, str]]:
    """What the numbers were measured under, as pairs for a reader."""
    m = results.machine
    said = {
        "device": m.get("device"),
        "CPU": f"{m.get('cpu')}, {m.get('cpu_cores')} cores, {m.get('threads')} threads",
        "load average": f"{m.get('load_average')} at the start, {m.get('load_average_end')} at the end",
        "date": m.get("date"),
        "commit": m.get("commit") or "none",
        "backbone": f"{m.get('backbone')} {json.dumps(m.get('model_args'))}",
        "protocol": f"{m.get('protocol')}: {m.get('dtype')}, batch {m.get('batch')}, softmax {m.get('softmax')}",
        "SDPA backend": ", ".join(
            f"{row.sdpa_backend} at {row.res} px" for row in results.rows if row.sdpa_backend is not None
        ),
        "TF32": "on" if m.get("tf32") else "off",
        "torch.compile": _compile_words(results),
        "PyTorch": m.get("torch"),
        "timm": m.get("timm"),
        "Python": m.get("python"),
        "CUDA": " / ".join(str(m[key]) for key in ("cuda", "cudnn", "driver") if m.get(key)),
        "duration": f"{m.get('seconds', 0):,.0f} s",
    }
    return [(key, str(value)) for key, value in said.items() if value not in (None, "")]


def _compile_words(results: Results) -> str:
    asked = results.machine.get("compile", "off")
    used = [f"{row.mechanism} at {row.res} px" for row in results.rows if row.compiled]
    if asked == "off":
        return "off for all"
    return f"{asked}: " + (f"used by {', '.join(used)}; eager where that was faster" if used else "nowhere faster")
