"""INT8: an OpenVINO IR quantised by NNCF, its ranges taken on photos. NNCF is in requirements-int8.txt."""

import logging

import numpy as np

from data import FaceDataset, to_input
from support.script import InputError

CALIBRATION = 300  # photos that the ranges are taken from


def decoding_names(model):
    """List the names of the operators after the last convolutions of an IR.

    They decode boxes; INT8 is too coarse for pixel coordinates.
    """
    waiting, names = [result.get_node() for result in model.outputs], set()
    while waiting:
        for node in (value.get_node() for value in waiting.pop().input_values()):
            name = node.get_friendly_name()
            if node.get_type_name() not in ("Convolution", "Constant", "Parameter") and name not in names:
                names.add(name)
                waiting.append(node)
    return sorted(names)


def spread(annotations, most):
    """Choose up to `most` photos, evenly spread over the dataset: a list of indices."""
    count = len(annotations.ids)
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()


def quantise(model, annotations, size):
    """Quantise an IR to INT8 weights and activations with NNCF, calibrated on photos of `annotations`.

    size is (width, height) of the network input. Raises InputError if NNCF is missing or a photo unreadable.
    """
    dataset, chosen = FaceDataset(annotations, *size), spread(annotations, CALIBRATION)

    def feed(index):
        item = dataset[index, None]
        if item.error:
            raise InputError(item.error)
        inputs = {"image": to_input(item.picture.flip(0)[None]).numpy()}  # [1, 3, H, W], BGR
        if len(model.inputs) > 1:
            inputs["picture"] = np.zeros((1, *size[::-1], 3), np.uint8)
        return inputs

    logging.disable(logging.WARNING)  # NNCF and its imports log a lot
    try:
        import nncf
        import rich
        rich.reconfigure(quiet=True)  # NNCF's progress bars
        # PERFORMANCE is symmetric. MIXED, with zero points, was 3 % slower and not more accurate.
        return nncf.quantize(model, nncf.Dataset(chosen, feed),
                             preset=nncf.QuantizationPreset.PERFORMANCE, subset_size=len(chosen),
                             ignored_scope=nncf.IgnoredScope(names=decoding_names(model)))
    except ImportError:
        raise InputError("--int8 needs NNCF: pip install -r requirements-int8.txt") from None
    finally:
        logging.disable(logging.NOTSET)
