"""A YAML file as plain data, its faults in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from vllm_puzzle.model_configs.schema import ConfigError


def load_yaml(file: Path, where: str) -> Any:
    """What the file holds. Raises ConfigError beginning with `where`."""
    try:
        return yaml.safe_load(file.read_text())
    except OSError as error:
        raise ConfigError(f"{where}: found {error.strerror}, allowed: a YAML file") from None
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{where}: found {' '.join(str(error).split())}, allowed: a YAML file") from None
