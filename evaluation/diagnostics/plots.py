"""Plots of what `evaluation.diagnostics.measures.measure` returns; they need matplotlib."""

import math
from typing import Any

import numpy as np

PANELS = 5
NAMED = 16  # lines of a legend
STYLES = ("-", "--", ":", "-.")
SCALES = np.logspace(-1, 4, 51)
SMALLEST = 1e-8  # what 0 is drawn as on a logarithmic axis


def panels(columns: int, rows: int = 1, width: float = 5.5, height: float = 4.0, **options):
    """A figure without a window, and its axes [rows, columns]."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def depth_colours(count: int):
    """A colour for each layer, dark for the first."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.9 * i / max(1, count - 1)) for i in range(count)]


def label(i: int, layer: dict) -> str:
    """Depth and mixer."""
    return f"{i} {layer['mixer']}"


def number(value: float | None) -> float:
    """A number to draw; NaN, which is not drawn, for None."""
    return math.nan if value is None else value


def plot_locality(result: dict[str, Any]) -> Any:
    """Mass of influence within a distance, a style for each mixer and a colour for each depth; what it comes to by depth."""
    layers = result["layers"]
    figure, ((reach, depth),) = panels(2, width=6.5)
    kinds = list(dict.fromkeys(layer["mixer"] for layer in layers))
    named = set(np.linspace(0, len(layers) - 1, NAMED).astype(int).tolist())
    for i, (layer, colour) in enumerate(zip(layers, depth_colours(len(layers)))):
        within = np.cumsum(layer["locality"]["mass"])
        style = STYLES[kinds.index(layer["mixer"]) % len(STYLES)]
        name = label(i, layer) if i in named else None
        reach.plot(np.arange(len(within)), 100 * within, style, color=colour, label=name)
    reach.set_xscale("symlog", base=2, linthresh=1)
    reach.set(xlabel="distance |t - s|", ylabel="influence within distance, %", ylim=(0, 102))
    reach.set(title=f"How far mixers reach, {result['sequences']} x {result['length']} tokens, step {result['step']}")
    reach.set_xlim(0, result["length"] - 1)
    reach.grid(alpha=0.3)
    reach.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    place = np.arange(len(layers))
    depth.plot(place, [number(layer["locality"]["mean_distance"]) for layer in layers], "o-", label="mean distance")
    entropy = [layer["locality"]["entropy"] for layer in layers]
    tokens = [math.nan if e is None else math.exp(e) for e in entropy]
    depth.plot(place, tokens, "s--", label="tokens that count, exp(entropy)")
    by_depth(depth, layers, "tokens")
    depth.set(title="Dilution by depth", ylim=(0, 1.25 * max(1, np.nanmax(tokens, initial=1))))
    depth.legend(loc="upper left", ncols=2)
    return figure


def by_depth(axes, layers, what):
    """Names the layers on the x axis."""
    axes.set_xticks(range(len(layers)), [label(i, layer) for i, layer in enumerate(layers)], rotation=30, ha="right")
    axes.set(ylabel=what, xlim=(-0.5, len(layers) - 0.5))
    axes.grid(alpha=0.3)


def plot_gradients(result: dict[str, Any]) -> Any:
    """Spread of gradients over tokens, and of d p / d s of attention maps where there are any."""
    layers = result["layers"]
    maps = [
        i for i, layer in enumerate(layers) if (layer["score_gradient"] or {}).get("normalization", "none") != "none"
    ]
    figure, (axes,) = panels(2 if maps else 1)
    place = np.arange(len(layers))
    for key, text, style in (("relative_std", "std / mean", "o-"), ("max_over_mean", "max / mean", "s--")):
        axes[0].plot(place, [number(layer["token_gradient"][key]) for layer in layers], style, label=text)
    by_depth(axes[0], layers, "ratio")
    axes[0].set(title="|d loss / d x_t| of the mixers' inputs, over tokens", yscale="log")
    axes[0].margins(y=0.2)
    axes[0].legend(loc="upper left", ncols=2)
    if maps:
        boxes = []
        for i in maps:
            q = layers[i]["score_gradient"]["quantiles"]
            ends = {"whislo": "1", "q1": "25", "med": "50", "q3": "75", "whishi": "99"}
            boxes.append({key: max(SMALLEST, q[percent]) for key, percent in ends.items()} | {"fliers": []})
        axes[1].bxp(boxes, positions=maps, showfliers=False, widths=0.5)
        top = [layers[i]["score_gradient"]["max"] for i in maps]
        axes[1].plot(maps, top, "v", color="tab:red", label="maximum")
        axes[1].axhline(0.25, color="tab:green", linestyle=":", label="1/4, the bound of a softmax")
        by_depth(axes[1], layers, "|d p / d s|")
        axes[1].set(title="Attention maps (box: quartiles, whiskers: 1 and 99 %)", yscale="log")
        axes[1].margins(y=0.2)
        axes[1].legend(loc="upper left", ncols=2)
    return figure


def plot_receptive_field(result: dict[str, Any]) -> Any:
    """Mean influence of tokens on logits by distance, and the distances that cover shares of it."""
    field = result["receptive_field"]
    figure, ((axes,),) = panels(1, width=7)
    profile = np.asarray(field["profile"])
    seen = profile > 0
    axes.plot(np.arange(len(profile))[seen], profile[seen], ".-", markersize=3)
    for (percent, distance), style in zip(field["cover"].items(), (":", "--", "-.")):
        if distance is not None:
            axes.axvline(distance, color="tab:red", linestyle=style, label=f"{percent} % within {distance}")
    axes.set_xscale("symlog", base=2, linthresh=1)
    axes.set(xlabel="distance |t - s|", ylabel="mean |d logits_t / d embedding_s|", yscale="log")
    axes.set(title=f"Receptive field of the model, step {result['step']}", xlim=(-0.2, 1.1 * len(profile)))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def plot_spectra(result: dict[str, Any]) -> Any:
    """Eigenvalues in the complex plane, and the time scales that they stand for; None where there are none."""
    found = [(i, layer) for i, layer in enumerate(result["layers"]) if layer["spectrum"].get("eigenvalues")]
    if not found:
        return None
    if len(found) > PANELS:
        found = [found[i] for i in np.linspace(0, len(found) - 1, PANELS).astype(int)]
    figure, (planes, scales) = panels(len(found), 2, width=3.6, height=3.4)
    angle = np.linspace(0, 2 * np.pi, 200)
    for (i, layer), plane, scale in zip(found, planes, scales):
        spectrum = layer["spectrum"]
        real, imaginary = np.asarray(spectrum["eigenvalues"]).T
        plane.plot(np.cos(angle), np.sin(angle), color="gray", linewidth=0.8)
        plane.scatter(real, imaginary, s=5, alpha=0.4)
        plane.set(title=label(i, layer), xlabel="real part", aspect="equal")
        share = (
            "" if spectrum["sampled"] >= spectrum["state"] else f"\n{spectrum['sampled']:.0f} of {spectrum['state']}"
        )
        plane.text(
            0.02, 0.98, f"{100 * spectrum['zeros']:.0f} % zeros{share}", transform=plane.transAxes, va="top", fontsize=8
        )
        tau = -1 / np.log(np.minimum(np.hypot(real, imaginary), 1 - 1e-7))
        scale.hist(np.clip(tau, SCALES[0], SCALES[-1]), bins=SCALES)
        scale.set(xscale="log", xlim=(SCALES[0], SCALES[-1]))
        scale.set_xlabel("time scale -1 / log |eigenvalue|, tokens\n(last bar: or more)")
    planes[0].set_ylabel("imaginary part")
    scales[0].set_ylabel("eigenvalues")
    return figure


PLOTS = {
    "locality": plot_locality,
    "gradients": plot_gradients,
    "receptive_field": plot_receptive_field,
    "spectra": plot_spectra,
}
