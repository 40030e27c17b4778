"""LinFusion's published folders, made of golden cases."""

import json

from safetensors.torch import save_file


def published(case, folder, revision="LinFusion"):
    """The golden case's plain UNet, and its weights in a folder as LinFusion's authors lay them out."""
    from diffusers import UNet2DConditionModel

    state, config = case.state_dict(), case.facts["kwargs"]["linfusion_config"]
    if revision == "StableMamba":  # the first revision of the published files
        modules = [[m["module_name"], m["dim_n"], m["heads"]] for m in config["modules_list"]]
        config = {"_class_name": revision, "modules_list": modules}
    ours = {k.removeprefix("linfusion."): v for k, v in state.items() if k.startswith("linfusion.")}
    save_file({k: v.clone() for k, v in ours.items()}, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    unet = UNet2DConditionModel(**case.facts["kwargs"]["unet_config"]).eval()
    plain = unet.state_dict()
    plain.update({k: state[f"unet.{k}"] for k in plain if "attn1" not in k})
    unet.load_state_dict(plain, strict=True)
    return unet
