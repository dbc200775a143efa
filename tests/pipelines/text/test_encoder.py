"""The text of prompts and of negative prompts is in fields of its own until the rows of a pass are made."""

import torch

from lora_compose.pipelines.text.encoder import EncodedText


def test_images_are_selected_from_both_sides() -> None:
    embeds, negative = torch.arange(3.0).view(3, 1, 1), torch.arange(10.0, 13).view(3, 1, 1)
    text = EncodedText(embeds, negative, {"sizes": embeds[:, 0]}, {"sizes": negative[:, 0]})
    some = text.of_images([2, 0])
    assert some.added is not None
    assert some.negative_added is not None
    assert some.negative_prompt_embeds is not None
    assert some.prompt_embeds.flatten().tolist() == some.added["sizes"].flatten().tolist() == [2, 0]
    assert some.negative_prompt_embeds.flatten().tolist() == some.negative_added["sizes"].flatten().tolist() == [12, 10]
    unguided = EncodedText(embeds, None, {"sizes": embeds[:, 0]}).of_images([1])
    assert (unguided.negative_prompt_embeds, unguided.negative_added) == (None, None)
