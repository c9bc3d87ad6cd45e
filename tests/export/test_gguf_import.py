import pytest
import torch
from gguf import GGMLQuantizationType as Type
from helpers.gguf_files import gguf_weights, make_model, rewrite, write_gguf
