"""Which class of transformers a checkpoint is opened with: the one place that decides it.

The folder decides. A text model is a causal language model; a model for images and text is opened as the wrapper that
its config.json names, with all its towers, also where transformers could take the text model out of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moesparse.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["in_towers", "opener", "text_part", "towers"]

# what a wrapper's config holds beside its text model where it has eyes or ears
_TOWERS = {"vision_config": "vision", "audio_config": "audio"}


def opener(config: PreTrainedConfig) -> Any:
    """The class of transformers whose `from_config` and `from_pretrained` make the model that a folder holds.

    Of those that fit the type of the config it is the one that `architectures` names; where that names none of them,
    the wrapper rather than the text model in it, so that nothing of a folder is lost.

    Raises:
        UnsupportedModelError: transformers has neither kind of model for it; names the type.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kinds: tuple[Any, ...] = (AutoModelForImageTextToText, AutoModelForCausalLM)
    fitting = [kind for kind in kinds if type(config) in kind._model_mapping]
    named = set(config.architectures or ())
    for kind in fitting:
        classes = kind._model_mapping[type(config)]
        if named & {each.__name__ for each in (classes if isinstance(classes, tuple) else (classes,))}:
            return kind
    if not fitting:
        raise UnsupportedModelError(
            "MODEL must be a causal language model of transformers, or one for images and text, got one of type "
            f"{config.model_type!r}, which is neither"
        )
    return fitting[0]


def towers(model: Any) -> list[str]:
    """What a model takes besides text: "vision", "audio"; nothing for a text model."""
    config = getattr(model, "config", None)
    return [name for key, name in _TOWERS.items() if getattr(config, key, None) is not None]


def in_towers(model: Any, name: str, layers: str) -> bool:
    """Whether a parameter lies beside the text model of a wrapper.

    Args:
        model: any.
        name: of the parameter.
        layers: the list of decoder layers, "model.language_model.layers".
    """
    text, _, _ = layers.rpartition(".")
    wrapper, _, _ = text.rpartition(".")
    return bool(towers(model)) and name.startswith(f"{wrapper}.") and not name.startswith(f"{text}.")


def text_part(config: Any) -> tuple[tuple[str, ...], Any]:
    """Path of keys to the config of the text model in a config, and that config; ((), config) in a text model."""
    for key in getattr(config, "sub_configs", {}):
        part = getattr(config, key, None)
        if part is not None and part is config.get_text_config():
            return (key,), part
    return (), config
