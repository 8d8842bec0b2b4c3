"""The figure: which panels, which scale, what is marked, and that nothing of the user's is touched."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path

import matplotlib
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from normfree.report.panels import describe_input, shorten
from normfree.report.plot import plot_signals
from normfree.signal.propagation import BlockSignal, Entry, SignalPropagation

LONG = "timm:a_model_with_a_name_that_goes_on(width=2,alpha=0.2,activation=silu,depths=[1,2,3],use_se=True)"


def signal_of(
    variances: list[float],
    *,
    model: str = "nf_resnet26",
    squares: list[float] | None = None,
    residuals: list[float | None] | None = None,
    expected: bool = True,
    kind: str = "residual",
    every: int = 4,
) -> SignalPropagation:
    """A measurement with the given curves; a transition block every so many."""
    blocks = tuple(
        BlockSignal(
            index=i,
            name=f"stages.{i // every}.{i % every}",
            kind=kind,
            shape=(2, 8, 4, 4),
            channel_axis=1,
            transition=i % every == 0,
            avg_channel_sq_mean=squares[i] if squares else 0.01,
            avg_channel_var=variance,
            residual_avg_channel_var=residuals[i] if residuals else None if kind == "layer" else 1.0,
            expected_var=1 + 0.04 * (i % every + 1) if expected else None,
        )
        for i, variance in enumerate(variances)
    )
    entry = Entry(name="stages.0", shape=(2, 8, 4, 4), channel_axis=1, avg_channel_sq_mean=0.01, avg_channel_var=1.0)
    given = {"kind": "gaussian", "examples": 2}
    return SignalPropagation(model=model, mode="train", input=given, entry=entry, blocks=blocks)


def ladder(count: int = 8, **changes: object) -> SignalPropagation:
    return signal_of([1 + 0.04 * (i % 4 + 1) for i in range(count)], **changes)  # type: ignore[arg-type]


def lines(figure: Figure, panel: str, gid: str) -> list[tuple[list[float], list[float]]]:
    (axes,) = [axes for axes in figure.axes if axes.get_label() == panel]
    found = [line for line in axes.lines if line.get_gid() == gid]
    return [([float(x) for x in line.get_xdata()], [float(y) for y in line.get_ydata()]) for line in found]  # type: ignore[union-attr]


def scales(figure: Figure) -> dict[str, str]:
    return {str(axes.get_label()): axes.get_yscale() for axes in figure.axes}


def texts(figure: Figure) -> str:
    found = [text.get_text() for text in figure.texts]
    for axes in figure.axes:
        found += [axes.get_title("left"), axes.get_title("right"), axes.get_xlabel(), axes.get_ylabel()]
        found += [text.get_text() for text in axes.texts]
    return "\n".join(found)


def assert_inside_and_apart(figure: Figure) -> None:
    """No text leaves the page, and neither headings nor legend touch each other."""
    figure.draw_without_rendering()
    page = figure.bbox
    boxes = [legend.get_window_extent() for legend in figure.legends]
    boxes += [text.get_window_extent() for text in figure.texts if text.get_text()]
    for axes in figure.axes:
        titles = [axes.title, axes._left_title, axes._right_title, axes.xaxis.label]  # type: ignore[attr-defined]
        boxes += [title.get_window_extent() for title in titles if title.get_text()]
    for number, box in enumerate(boxes):
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
        assert not any(box.overlaps(other) for other in boxes[number + 1 :])


def test_file_is_a_png_of_200_dpi_and_pyplot_knows_nothing(tmp_path: Path) -> None:
    from matplotlib import pyplot

    before = dict(matplotlib.rcParams)
    figure = plot_signals([ladder()], tmp_path / "deep" / "spp.png")
    assert (tmp_path / "deep" / "spp.png").read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["spp.png"]
    assert figure.dpi == 200
    assert pyplot.get_fignums() == []
    assert dict(matplotlib.rcParams) == before


def test_the_users_style_changes_nothing() -> None:
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 30, "text.usetex": True}):
        figure = plot_signals([ladder()])
    assert to_hex(figure.axes[0].get_facecolor()) == "#ffffff"


def test_panels_follow_what_was_measured() -> None:
    three = ["avg_channel_sq_mean", "avg_channel_var", "residual_avg_channel_var"]
    assert list(scales(plot_signals([ladder()]))) == three
    heard = ladder(model="heard")
    blocks = tuple(replace(b, input_correlation=0.1, avg_sq_gradient=1e-3) for b in heard.blocks)
    both = plot_signals([ladder(), replace(heard, blocks=blocks)])
    assert list(scales(both)) == [*three, "input_correlation", "avg_sq_gradient"]
    layers = plot_signals([ladder(kind="layer")])
    assert list(scales(layers)) == three[:2]
    assert "weighted layer index" in texts(layers) and "block index" not in texts(layers)


@pytest.mark.parametrize(("top", "scale"), [(90.0, "linear"), (110.0, "log")])
def test_log_scale_beyond_two_decades(top: float, scale: str) -> None:
    figure = plot_signals([signal_of([1.0, 10.0, top], expected=False)])
    expected = {
        "avg_channel_sq_mean": "linear",
        "avg_channel_var": scale,
        "residual_avg_channel_var": "linear",
    }
    assert scales(figure) == expected
    assert figure.axes[1].get_ylabel() == f"{scale} scale"


def test_points_stand_at_their_block_index() -> None:
    figure = plot_signals([signal_of([2.0, 3.0])])
    assert lines(figure, "avg_channel_var", "curve") == [([-1.0, 0.0, 1.0], [1.0, 2.0, 3.0])]
    assert [label.get_text() for label in figure.axes[-1].get_xticklabels()] == ["entry", "0", "1"]


def test_expected_variance_and_reference_are_drawn() -> None:
    figure = plot_signals([ladder(4)])
    ((_, ys),) = lines(figure, "avg_channel_var", "expected")
    assert math.isnan(ys[0]) and ys[1:] == pytest.approx([1.04, 1.08, 1.12, 1.16])
    assert lines(figure, "residual_avg_channel_var", "reference")[0][1] == [1.0, 1.0]
    assert lines(plot_signals([ladder(4, expected=False)]), "avg_channel_var", "expected") == []


def test_transitions_are_ticks_where_models_agree_and_hollow_markers_elsewhere() -> None:
    alone = lines(plot_signals([ladder(8)]), "avg_channel_var", "transition")
    assert [xs[0] for xs, _ in alone] == [0.0, 4.0]
    mixed = lines(plot_signals([ladder(8), ladder(9, every=3)]), "avg_channel_var", "transition")
    assert [xs for xs, _ in mixed] == [[0.0, 4.0], [0.0, 3.0, 6.0]]


def test_non_finite_values_are_gaps_and_marked() -> None:
    sick = signal_of(
        [1.0, 1e5, math.inf, math.nan], squares=[0.0, 1.0, 1e3, math.nan], residuals=[None, 1.0, None, 2.0]
    )
    figure = plot_signals([sick])
    ((_, ys),) = lines(figure, "avg_channel_var", "curve")
    assert ys[:3] == [1.0, 1.0, 1e5] and all(map(math.isnan, ys[3:]))
    assert lines(figure, "avg_channel_var", "non-finite") == [([2.0], [1.0])]
    assert lines(figure, "avg_channel_sq_mean", "zero") == [([0.0], [0.0])]
    assert "non-finite from block 2" in texts(figure) and "non-finite from block 3" in texts(figure)
    assert lines(figure, "residual_avg_channel_var", "non-finite") == []


def test_rounding_noise_in_the_squared_mean_is_a_zero() -> None:
    steady = signal_of([1.0, 2.0, 1.0, 2.0], squares=[0.1, 3e-15, 0.1, 1.5e-12])
    assert scales(plot_signals([steady]))["avg_channel_sq_mean"] == "linear"
    ((_, ys),) = lines(plot_signals([steady]), "avg_channel_sq_mean", "curve")
    assert ys == [0.01, 0.1, 0.0, 0.1, 0.0]
    faint = plot_signals([signal_of([1e-20, 1e-20], squares=[1e-21, 1e-20])])
    assert lines(faint, "avg_channel_sq_mean", "zero") == []


def test_nothing_finite_at_all_says_so() -> None:
    figure = plot_signals([signal_of([1.0, 2.0], residuals=[None, math.nan], squares=[0.0, 0.0])])
    assert "no finite value" in texts(figure)
    plot_signals([signal_of([])])
    plot_signals([signal_of([1e308, 1e-308, 5e-324, 0.0])]).draw_without_rendering()


def test_six_models_with_difficult_names_fit_on_the_page(tmp_path: Path) -> None:
    names = ["_hidden", "$\\frac{$", LONG, LONG[::-1], "two\nlines", "<script>alert(1)</script>"]
    models = [replace(ladder(8 + 5 * i, every=3 + i, model=name), mode=f"mode {i}") for i, name in enumerate(names)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = plot_signals(models, tmp_path / "spp.png", title="A title " * 20)
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown[:2] == names[:2] and "two lines" in shown and LONG[:20] == shown[2][:20]
    assert_inside_and_apart(figure)
    styles = {
        (str(line.get_color()), str(line.get_marker()), str(line.get_linestyle()))
        for line in figure.legends[0].get_lines()
    }
    assert len(styles) >= 6 and len({marker for _, marker, _ in styles}) >= 6


def test_200_blocks_have_few_markers_and_fit() -> None:
    figure = plot_signals([ladder(200, every=50), ladder(200, every=50, model="twin")])
    (line, *_) = [line for line in figure.axes[0].lines if line.get_gid() == "curve"]
    assert len(line.get_markevery()) < 15  # type: ignore[arg-type]
    assert_inside_and_apart(figure)


def test_caption_tells_how_it_was_measured() -> None:
    told = texts(plot_signals([ladder()]))
    assert "Mode train; input gaussian, 2 examples; channels on axis 1." in told
    assert "a, b: mode train" not in told
    apart = texts(plot_signals([ladder(model="a"), replace(ladder(model="b"), mode="eval")]))
    assert "a: mode train" in apart and "b: mode eval" in apart


def test_words() -> None:
    assert (
        describe_input({"shape": [3, 8, 8], "kind": "photos", "examples": 1})
        == "photos, 1 example, shape 3\u00d78\u00d78"
    )
    assert describe_input({}) == "not recorded"
    assert shorten("abcdefghij", 7) == "abcd…ij" and shorten(" a\n b ", 7) == "a b"


def test_no_model_is_an_error() -> None:
    with pytest.raises(ValueError, match="signals"):
        plot_signals([])


@pytest.mark.parametrize("top", [130.0, 1e3, 4.2e4, 9e17, 3e30])
def test_a_logarithmic_axis_has_a_number_at_its_top(top: float) -> None:
    figure = plot_signals([signal_of([1.0, top / 30, top])])
    axes = next(a for a in figure.axes if a.get_label() == "avg_channel_var")
    low, high = axes.get_ylim()
    ticks = [tick for tick in axes.get_yticks() if low <= tick <= high]
    assert top <= ticks[-1] < 2.6 * top and 3 <= len(ticks) <= 9
    assert all(label.get_text() for label in axes.get_yticklabels())


def test_zeros_of_several_models_are_seen_apart() -> None:
    signals = [signal_of([1.0, 1e4, 1e8], squares=[0.0, 1.0, 1e3]) for _ in range(3)]
    figure = plot_signals(signals)
    heights = [y[0] for _, y in lines(figure, "avg_channel_sq_mean", "zero")]
    assert len(set(heights)) == len(heights) == 3
