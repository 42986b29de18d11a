"""Figures show the numbers of the history, and say what is missing."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lipdyn_torch import History, forecast, moments, pathwise, plots
from lipdyn_torch.history import NETWORK
from lipdyn_torch.predict import SDE, observed, sde

FIGURES = [
    *(plots.summary_figure, plots.log_k_figure, plots.forces_figure, plots.heatmap_figure),
    *(plots.validity_figure, plots.split_figure),
]
LAYERS = ["body.0", "head"]


def history(steps: int = 30, every: int = 1, unknown: int | None = None, layers: list[str] = LAYERS) -> History:
    """Rows with plain numbers; the noise terms of one step may be unknown."""
    rows = []
    rng = np.random.default_rng(0)
    z = dict.fromkeys(layers, 0.5)
    for step in range(0, steps * every, every):
        made = []
        for name in layers:
            noise = math.nan if step == unknown else 1.0
            row = {"step": step, "layer": name, "lr": 0.1, "batch": 4, "sigma": math.exp(z[name]), "gap": 0.1}
            row |= {"eps": 0.05 * (step + 1), "mu": noise * float(rng.normal()), "z": z[name], "gHg": 0.0}
            row |= {"kappa_var": noise * 0.3, "kappa_cov": -noise * 0.1, "kappa": noise * 0.2}
            row |= {"lambda_sq_var": noise * 0.4, "lambda_sq_cov": noise * 0.2, "lambda_sq": noise * 0.6}
            dz = 0.1 * float(rng.normal())
            made.append(row | {"dz": dz, "dz1": dz, "dz2": dz, "dz3": dz, "status": "ok"})
            z[name] += every * dz
        summed = ("z", "dz", "dz1", "dz2", "dz3", "mu", *(k for k in made[0] if k.startswith(("kappa", "lambda"))))
        rows += [*made, made[0] | {"layer": NETWORK} | {key: sum(row[key] for row in made) for key in summed}]
    return History(rows, {"sampling": "shuffle", "dataset_size": 40})


@pytest.mark.parametrize("context", ["paper", "slide"])
@pytest.mark.parametrize("draw", FIGURES, ids=lambda f: f.__name__)
def test_figures_are_drawn_at_their_size(tmp_path, draw, context):
    figure = draw(history(), context=context)
    width, height = figure.get_size_inches()
    assert width == pytest.approx({"paper": 7.0, "slide": 13.3}[context])
    assert height < 0.75 * width
    sizes = {text.get_fontsize() for axes in figure.get_axes() for text in [axes.title, *axes.get_xticklabels()]}
    assert min(sizes) >= {"paper": 7, "slide": 15}[context]
    figure.savefig(tmp_path / "figure.png", dpi=50)
    boxes = [axes.get_tightbbox() for axes in figure.get_axes()]
    bounds = figure.bbox
    assert all(b.x0 >= -1 and b.x1 <= bounds.x1 + 1 and b.y0 >= -1 and b.y1 <= bounds.y1 + 1 for b in boxes)


@pytest.mark.parametrize("draw", FIGURES, ids=lambda f: f.__name__)
def test_figures_take_tables_gaps_and_missing_terms(tmp_path, draw):
    for case in (history(every=3), history(unknown=5), history(layers=[f"layer.{k}" for k in range(40)])):
        draw(case.to_pandas()).savefig(tmp_path / "figure.png", dpi=30)


def test_every_layer_has_a_style_and_a_place_in_the_legend():
    """Also names that Matplotlib would leave out; beyond 21 layers the rest share a grey line."""
    for names in (["_stem", "_fc", "head"], [f"{k}" for k in range(23)]):
        for draw in (plots.summary_figure, plots.validity_figure):
            figure = draw(history(layers=names))
            parent = figure.subfigs[1] if draw is plots.summary_figure else figure
            legend = parent.legends[0]
            own = names[: plots.NAMED]
            labels = [text.get_text().strip() for text in legend.get_texts()]
            assert labels == [*own, *(["and 2 more"] if len(names) > plots.NAMED else [])]
            lines = legend.get_lines()
            styles = {(line.get_color(), str(line.get_linestyle()), str(line._dash_pattern)) for line in lines}
            assert len(styles) == len(labels)


ATTENTION = [f"model.layers.{k}.self_attn.{part}_proj" for k in (9, 10) for part in "qkvo"][1:]
BLOCKS = [f"layer{k}.{b}.{part}" for k in (1, 2, 3, 4) for b in (0, 1) for part in ("conv1", "conv2", "downsample.0")]
DEEP = [f"encoder_block_{k:02}_self_attention_output_projection_dense" for k in range(21)]


@pytest.mark.parametrize("context", ["paper", "slide"])
@pytest.mark.parametrize("names", [LAYERS, ATTENTION, ["conv1", *BLOCKS], DEEP], ids=lambda names: names[-1])
@pytest.mark.parametrize("draw", [plots.summary_figure, plots.validity_figure], ids=lambda f: f.__name__)
def test_legends_are_inside_the_figure_and_beside_the_panels(draw, names, context):
    figure = draw(history(steps=3, layers=names), context=context)
    figure.draw_without_rendering()
    legends = [legend for part in (figure, *figure.subfigs) for legend in part.legends]
    panels = [axes.bbox for axes in figure.get_axes()]
    assert len(legends) == (2 if figure.subfigs else 1)
    assert all(axes.get_legend() is None for axes in figure.get_axes())  # which would lie on its curves
    for legend in legends:
        labels = [text.get_text() for text in legend.get_texts()]
        assert len(set(labels)) == len(labels)
        for box in (legend.get_window_extent(), *(text.get_window_extent() for text in legend.get_texts())):
            assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
            assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1
            assert not box.count_overlaps(panels)
    assert (
        min(panel.height for panel in panels) > 0.15 * figure.bbox.width
    )  # the rows of a legend have room of their own


def test_one_legend_names_the_curves_of_both_panels():
    figure = plots.log_k_figure(history())
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert named == [
        *("observed", f"{SDE}\n(no curvature along it)", "SDE, 1 sd over batches"),
        *("pathwise, order 2", "pathwise, order 3"),
    ]


def test_long_names_are_cut_and_stay_distinct():
    stages = [f"net.stages.{a}.layers.{b}.layer.{c}.convolution" for a in range(3) for b in range(3) for c in range(3)]
    nested = [f"base_model.model.model.layers.{k}.attn.{part}.lora_A.default" for k in range(30) for part in "qk"]
    twins = ["x" * 80 + "a" + "x" * k for k in (80, 81)]
    for names in (["a" * 99], ["a.b", "a.b.c" * 9], stages, nested, twins, DEEP):
        cut = plots._shortened(names)
        assert len(set(cut)) == len(names)
        assert max(map(len, cut)) <= plots.LONGEST or names is twins
    assert plots._shortened(ATTENTION) == ATTENTION
    ticks = plots.heatmap_figure(history(steps=2, layers=DEEP)).get_axes()[0].get_yticklabels()
    assert [tick.get_text() for tick in ticks] == plots._shortened(DEEP)


def test_a_layer_that_is_zero_at_first(tmp_path):
    """Its logarithm is not known until it has moved; everything else starts from there."""
    rows = history().rows
    changed = [{**row, "z": math.nan, "dz": math.nan, "dz2": math.nan} if row["step"] == 0 else row for row in rows]
    late = History(changed, history().meta)
    step, z = observed(late)
    assert step[0] == 1
    assert np.isfinite(z).all()
    assert np.isfinite(pathwise(late).predicted).all()
    assert np.isfinite(sde(late).predicted).all()
    assert np.isfinite(forecast(late, at=10).predicted).all()
    assert np.isfinite(moments(late, gradient="batch", sampling="iid").log_mean).all()
    _, added, _ = plots._contributions(late)
    assert np.isfinite(added).all()
    panel = plots.heatmap_figure(late).get_axes()[0]
    assert np.isfinite(panel.collections[0].get_array()[:, 1:]).all()


def test_panels_without_any_term_say_so():
    figure = plots.summary_figure(history(steps=1, unknown=0))
    assert all("not known" in axes.texts[0].get_text() for axes in figure.subfigs[1].get_axes())

    lines = [line for axes in figure.subfigs[1].get_axes() for line in axes.get_lines()]
    assert not any(np.isfinite(line.get_ydata()).any() for line in lines)  # no line of zero through the words


def test_parts_without_any_value_say_so():
    for axes in plots.split_figure(history(steps=1, unknown=0)).get_axes():
        assert "not known" in axes.texts[0].get_text()
        assert not any(np.isfinite(line.get_ydata()).any() for line in axes.get_lines())


def marked(line) -> list[int]:
    """Where a line has markers."""
    return line.get_markevery() if line.get_marker() == "o" else []


@pytest.mark.parametrize("draw", [f for f in FIGURES if f not in (plots.forces_figure, plots.heatmap_figure)])
def test_a_single_step_is_drawn(draw):
    """Where a line has but one point, a marker shows it."""
    figure = draw(history(steps=1))
    lines = [line for axes in figure.get_axes() for line in axes.get_lines() if not line.get_label().startswith("_")]
    assert lines
    assert all(marked(line) == ([0] if len(line.get_xdata()) == 1 else []) for line in lines)


def test_points_between_unknown_ones_are_drawn():
    unknown = {1, 3, 10, 11}
    terms = dict.fromkeys(("mu", "kappa", "lambda_sq", "eps", "gap"), math.nan)
    lost = History([row | (terms if row["step"] in unknown else {}) for row in history()], {"sampling": "iid"})
    for axes in [*plots.summary_figure(lost).subfigs[1].get_axes(), *plots.validity_figure(lost).get_axes()]:
        assert [marked(line) for line in axes.get_lines()[:2]] == [[0, 2], [0, 2]]


def test_one_step_of_an_epoch_of_two_has_a_band():
    """Between the ends of epochs, where the order of the batches does not matter, it is as wide as a bar."""
    twos = History(history(steps=6).rows, {"sampling": "shuffle", "dataset_size": 8})
    _, axes = plots.log_k_figure(twos).get_axes()
    bars = axes.collections[-1].get_segments()
    assert [bar[0][0] for bar in bars] == [1, 3, 5]
    assert [bar[1][1] for bar in bars] == pytest.approx(sde(twos).half_width[1::2])


@pytest.mark.parametrize("draw", FIGURES, ids=lambda f: f.__name__)
def test_no_rows_at_all(draw):
    with pytest.raises(ValueError, match="no step has been measured yet"):
        draw(History([]))


def test_the_style_does_not_leak():
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    plots.forces_figure(history(), context="slide")
    with pytest.raises(ValueError, match="expected context 'paper' or 'slide', got 'poster'"):
        plots.forces_figure(history(), context="poster")
    assert dict(mpl.rcParams) == before


def test_log_k_and_the_band():
    axes = plots.log_k_figure(history()).get_axes()[0]
    lines = {line.get_label(): line.get_ydata() for line in axes.get_lines()}
    prediction = sde(history())
    assert lines["observed"] == pytest.approx(prediction.observed)
    assert lines[SDE] == pytest.approx(prediction.predicted)
    (band,) = axes.collections
    edge = band.get_paths()[0].vertices
    assert edge[:, 1].max() == pytest.approx((prediction.predicted + prediction.half_width).max())


def test_the_band_has_a_label_where_it_can_be_seen():
    rows = history().rows
    narrow = History([{**row, "lambda_sq": 1e-9 * row["lambda_sq"]} for row in rows], history().meta)
    for case, named in ((history(), True), (narrow, False)):
        axes = plots.log_k_figure(case).get_axes()[0]
        assert any("1 sd" in label for label in axes.get_legend_handles_labels()[1]) == named


def test_the_error_of_the_sde_says_what_it_leaves_out():
    _, axes = plots.log_k_figure(history()).get_axes()
    assert f"{SDE}\n(no curvature along it)" in [line.get_label() for line in axes.get_lines()]


@pytest.mark.parametrize("draw", [plots.summary_figure, plots.split_figure], ids=lambda f: f.__name__)
def test_moving_averages_say_their_unit_and_that_the_first_are_short(draw):
    figure = draw(history(steps=80))
    panels = (figure.subfigs[1] if draw is plots.summary_figure else figure).get_axes()
    labels = [axes.get_ylabel() for axes in panels]
    assert all("per unit time" in label for label in labels)
    assert labels[0].endswith("mean of ≤ 2 monitored steps")


@pytest.mark.parametrize("draw", [plots.summary_figure, plots.split_figure], ids=lambda f: f.__name__)
def test_moving_averages_are_over_what_is_known(draw):
    """One unknown step in every window leaves no gap, only a window without any known step does."""
    unknown = {*range(0, 120, 3), *range(60, 66), *range(110, 120)}
    terms = ("mu", "kappa", "lambda_sq", "kappa_var", "kappa_cov", "lambda_sq_var", "lambda_sq_cov")
    rows = [row | dict.fromkeys(terms if row["step"] in unknown else (), math.nan) for row in history(steps=120)]
    lost = History(rows, {"sampling": "iid"})
    figure = draw(lost)
    frame = lost.to_pandas().set_index("step")
    for axes in (figure.subfigs[1] if draw is plots.summary_figure else figure).get_axes():
        line = axes.get_lines()[0]
        name = NETWORK if draw is plots.split_figure else LAYERS[0]
        (column,) = (column for column, (title, _) in plots.RATES.items() if title == axes.get_title())
        values = frame[frame["layer"] == name][column]
        windows = [values.loc[max(0, k - 2) : k].dropna() for k in range(120)]
        assert line.get_ydata() == pytest.approx([w.mean() for w in windows], nan_ok=True)
        steps = [w.index.to_numpy().mean() if len(w) else math.nan for w in windows]
        assert line.get_xdata() == pytest.approx(steps, nan_ok=True)
        gaps = np.flatnonzero(np.isnan(line.get_ydata()))
        assert gaps.tolist() == [0, *range(62, 67), *range(112, 120)]
        assert axes.get_xlim()[1] > 119  # the gap at the end is seen


def stacked(figure) -> tuple[np.ndarray, dict[str, list]]:
    """The observed line, and the vertical extent of every area at the last step."""
    axes = figure.get_axes()[0]
    extents: dict[str, list] = {}
    areas = axes.collections
    for up, down in zip(areas[::2], areas[1::2], strict=True):
        ends = [v[1] for area in (up, down) for v in area.get_paths()[0].vertices if v[0] == axes.get_xlim()[1]]
        extents[up.get_label()] = ends
    return axes.get_lines()[-1].get_ydata(), extents


@pytest.mark.parametrize("every", [1, 3])
def test_the_stack_adds_up_to_what_was_observed(every):
    h = history(every=every)
    line, extents = stacked(plots.forces_figure(h))
    _, z = observed(h)
    assert line == pytest.approx(z - z[0])
    assert list(extents) == list(plots.FORCES)
    above = max(max(ends) for ends in extents.values())
    below = min(min(ends) for ends in extents.values())
    assert above + below == pytest.approx(line[-1])
    # 29 monitored steps stand for all up to the next, the last for itself: 0.1 * 2 layers * (kappa or -lambda^2/2)
    time = 0.1 * 2 * (29 * every + 1)
    curvature, ito = (extents[name] for name in ("noise curvature", "Ito term of the noise"))
    assert max(curvature) - min(e for e in curvature if e >= max(curvature) - 0.2 * time - 1e-9) == pytest.approx(
        0.2 * time
    )
    assert -0.3 * time == pytest.approx(min(ito) - max(e for e in ito if e <= min(ito) + 0.3 * time + 1e-9))


def test_steps_without_terms_are_counted_and_belong_to_the_rest():
    known, unknown = (plots.forces_figure(history(unknown=step)) for step in (None, 5))
    labels = [[text.get_text() for text in f.legends[0].get_texts()] for f in (known, unknown)]
    assert labels[0][:4] == list(plots.FORCES)
    assert labels[1][3] == "rest, not in the SDE\n(and 1 steps without noise terms)"
    assert stacked(unknown)[0] == pytest.approx(stacked(known)[0])


def test_heat_maps_hold_the_layers_values():
    h = history(unknown=5)
    figure = plots.heatmap_figure(h)
    panels = [axes for axes in figure.get_axes() if axes.get_title()]
    frame = h.to_pandas()
    for axes, column in zip(panels, ("z", "mu", "lambda_sq"), strict=True):
        shown = np.ma.filled(axes.collections[0].get_array(), np.nan)
        assert [tick.get_text() for tick in axes.get_yticklabels()] == LAYERS
        for row, name in zip(shown, LAYERS, strict=True):
            want = frame[frame["layer"] == name][column].to_numpy()
            assert row == pytest.approx(want - want[0] if column == "z" else want, nan_ok=True)
    assert (
        np.isnan(panels[1].collections[0].get_array()[:, 5].astype(float)).all()
        or np.ma.getmaskarray(panels[1].collections[0].get_array())[:, 5].all()
    )
    long = plots.heatmap_figure(history(steps=450)).get_axes()[0].collections[0].get_array()
    assert long.shape == (2, 200)


def test_a_frozen_layer_keeps_the_noise_on_a_logarithmic_scale():
    """Zeros are white, what is not known has no colour; signed values are about zero whatever their signs."""
    import matplotlib as mpl

    frozen = [row | {"lambda_sq": row["lambda_sq"] * (row["layer"] != "head")} for row in history(unknown=5)]
    still = [row | {"lambda_sq": 0.0} for row in history()]
    falling = [row | {"mu": -abs(row["mu"]), "z": -row["step"]} for row in history()]
    rising = [row | {"mu": abs(row["mu"]), "z": row["step"]} for row in history()]
    for rows, zeros in ((frozen, 29), (still, 60), (falling, 0), (rising, 0)):
        figure = plots.heatmap_figure(History(rows))
        figure.draw_without_rendering()
        *signed, noise = [axes for axes in figure.get_axes() if axes.get_title()]
        scales = [axes.collections[0].norm for axes in signed]
        assert all(scale.vmin == -scale.vmax and type(scale) is mpl.colors.Normalize for scale in scales)
        scale = noise.collections[0].norm
        assert isinstance(scale, mpl.colors.LogNorm)
        assert 0 < scale.vmin <= scale.vmax
        assert len(noise.collections) == (2 if zeros else 1)
        for white in noise.collections[1:]:
            colours = white.to_rgba(white.get_array()).reshape(-1, 4)
            assert sorted(map(tuple, colours)) == [(0, 0, 0, 0)] * (60 - zeros) + [(1, 1, 1, 1)] * zeros


def test_validity_marks_where_certificates_end():
    left, right = plots.validity_figure(history()).get_axes()[:2]
    assert [line.get_label() for line in left.get_lines()] == LAYERS
    assert right.get_lines()[0].get_ydata() == pytest.approx([0.05 * (k + 1) for k in range(30)])
    low, high = right.patches[0].get_extents().transformed(right.transData.inverted()).intervaly
    assert low == pytest.approx(1.0)
    assert high >= 1.5
    assert right.get_yscale() == left.get_yscale() == "log"


@pytest.mark.parametrize("context", ["paper", "slide"])
@pytest.mark.parametrize("decades", [(-12, 6), (-8, -1), (-1, 1), (2, 3)])
def test_nothing_runs_through_no_certificate(context, decades):
    eps = np.logspace(*decades, 30)
    figure = plots.validity_figure(History([row | {"eps": eps[row["step"]]} for row in history()]), context=context)
    figure.draw_without_rendering()
    axes = figure.get_axes()[1]
    words = axes.texts[0].get_window_extent()
    for line in axes.get_lines():
        points = line.get_transform().transform(line.get_xydata())
        assert points[:, 1].max() < words.y0
    assert words.y1 < axes.bbox.y1


def test_split_shows_parts_with_their_signs():
    axes = plots.split_figure(history()).get_axes()[0]
    lines = {line.get_label(): line.get_ydata() for line in axes.get_lines()}
    assert lines["all"] == pytest.approx(0.4)
    assert lines["variances"] == pytest.approx(0.6)
    assert lines["covariances"] == pytest.approx(-0.2)
    rows = [{k: v for k, v in row.items() if not k.endswith(("_var", "_cov"))} for row in history()]
    with pytest.raises(ValueError, match="expected a history with variance and covariance parts, got one without; mon"):
        plots.split_figure(History(rows))
