"""The model: RoPE against transformers, a row of documents against the same documents alone."""
import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from conftest import assert_close, row, tiny_config, tiny_model

