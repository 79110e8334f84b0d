"""Curves of a measurement as a picture. matplotlib is imported only where one is drawn."""

from support.script import whole_file


def plot_curves(curves, path):
    """Plot precision-recall curves {name: metrics.Curve} to a picture file, the APs in the legend."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        shown = curve.recall <= curve.recall.max()
        axes.plot(curve.recall[shown], curve.precision[shown], label=f"{name}: AP {curve.ap:.3f}")
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(loc="lower left")
    axes.grid(alpha=0.3)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=110)
