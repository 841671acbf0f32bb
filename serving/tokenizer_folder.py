"""The tokenizer of a model folder, without its remote code and without a question on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_puzzle.model_configs.schema import ConfigError


def load_tokenizer(folder: Path, place: str) -> Any:
    """A transformers tokenizer. Raises ConfigError naming `place` where the folder has none that loads."""
    from transformers import AutoConfig, AutoTokenizer, logging  # seconds of imports
    from vllm_puzzle.serving.hf_config import CONFIGS

    for config_class in CONFIGS:  # transformers looks at the configuration first, and knows not all of them
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what it says about the configuration's class matters to no tokenizer
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever it dies of, there is no tokenizer
        what = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{place}: found no tokenizer in {str(folder)!r} ({what}), allowed: a folder with one"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
