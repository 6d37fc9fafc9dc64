"""What an exported directory needs besides, so that sentence-transformers opens it."""

import shutil
from pathlib import Path

from jfe_jax.models.hf_json import write_json

MODULE = Path(__file__).parent / "exported" / "modeling_jfe.py"


def add_layout(directory: Path) -> None:
    """Adds the list of modules, the settings and the module itself to a directory that `save_hf` writes."""
    shutil.copyfile(MODULE, directory / MODULE.name)
    modules = [{"idx": 0, "name": "0", "path": "", "type": f"{MODULE.stem}.JointFusionEncoder"}]
    settings = {
        "model_type": "SentenceTransformer",
        "prompts": {},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    for name, tree in (("modules.json", modules), ("config_sentence_transformers.json", settings)):
        write_json(directory / name, tree)
