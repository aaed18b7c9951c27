"""Data sets: labelled images in memory or in files, split in parts, read in a given order."""

from wfnet.data.cache import CachedImages
from wfnet.data.dataset import (
    Batch,
    CorruptImage,
    Dataset,
    Selection,
    classes_of,
    labels_of,
    select,
)
from wfnet.data.folder import ImageFiles
from wfnet.data.foreign import as_dataset
from wfnet.data.loading import CorruptImages, batches, corrupt_counter, corrupt_limit
from wfnet.data.multi_hot import (
    MultiLabelFiles,
    MultiLabelTensors,
    is_of,
    label_loss,
    multi_hot_of,
    truth_of,
)
from wfnet.data.open import folder_classes, open_data
from wfnet.data.shards import ImageShards
from wfnet.data.splits import Splits, limit_per_class, split_dataset, stratified_split
from wfnet.data.tensor_images import TensorImages
from wfnet.data.transforms import evaluation_transform, model_data_config, training_transform

__all__ = [
    "Batch",
    "CachedImages",
    "CorruptImage",
    "CorruptImages",
    "Dataset",
    "ImageFiles",
    "ImageShards",
    "MultiLabelFiles",
    "MultiLabelTensors",
    "Selection",
    "Splits",
    "TensorImages",
    "as_dataset",
    "batches",
    "classes_of",
    "corrupt_counter",
    "corrupt_limit",
    "evaluation_transform",
    "folder_classes",
    "is_of",
    "label_loss",
    "labels_of",
    "limit_per_class",
    "model_data_config",
    "multi_hot_of",
    "open_data",
    "select",
    "split_dataset",
    "stratified_split",
    "training_transform",
    "truth_of",
]
