"""Curves of a measurement as a picture. matplotlib is imported only where one is drawn."""

from support.script import whole_file


def plot_curves(curves, path, by_score=None):
    """Plot precision-recall curves {name: metrics.Curve} to a picture file, the APs in the legend.

    With `by_score`, a metrics.score_curve, precision, recall and false detections a photo stand beside them.
    """
    from matplotlib.figure import Figure
    figure = Figure(figsize=(12 if by_score else 6, 5), layout="constrained")
    panels = figure.subplots(1, 2 if by_score else 1, squeeze=False)[0]
    for name, curve in curves.items():
        shown = curve.recall <= curve.recall.max()
        panels[0].plot(curve.recall[shown], curve.precision[shown], label=f"{name}: AP {curve.ap:.3f}")
    panels[0].set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    panels[0].legend(loc="lower left")
    if by_score:
        for name in ("precision", "recall"):
            panels[1].plot(by_score["score"], by_score[name], label=name)
        panels[1].set(xlabel="score of at least", ylabel="precision, recall", ylim=(0, 1.02))
        right = panels[1].twinx()
        false = by_score["false_per_picture"]
        right.plot(by_score["score"], false, "C3", label="false per photo")
        right.set(ylabel="false per photo", yscale="log" if false.any() else "linear")
        lines = panels[1].get_lines() + right.get_lines()
        panels[1].legend(lines, [line.get_label() for line in lines], ncols=4, fontsize="small",
                         loc="lower center", bbox_to_anchor=(0.5, 1))
    for axes in panels:
        axes.grid(alpha=0.3)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=110)
