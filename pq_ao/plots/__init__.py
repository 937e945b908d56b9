"""Pictures: what the method does to a model's activations, how its blocks are fine-tuned, and how fast it is."""

from pq_ao.plots.finetuning import plot_finetuning
from pq_ao.plots.outliers import plot_outliers
from pq_ao.plots.speedups import plot_speedups, plotted

__all__ = ["plot_finetuning", "plot_outliers", "plot_speedups", "plotted"]
