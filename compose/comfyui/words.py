"""What the nodes say, in the words of the page; a test compares them, since the page's module loads diffusers."""

METHODS = {
    "draft": (
        "A few first steps show where the model puts each subject, and each LoRA acts there. Boxes are kept, and not "
        "needed."
    ),
    "regional": "Each LoRA acts in its box only. Nothing moves the subjects into their boxes.",
    "tara": "Each LoRA acts on its own trigger. Best for LoRAs that were trained with TARA.",
    "merge": "All LoRAs act everywhere, as in most tools. Subjects may blend.",
}
"""The methods, with what they do."""

AUTO = "As without a method in lora-compose: draft, regional, tara or merge. The log says which, and why."
"""The choice of a method."""

MERGERS = {
    "cat": "The exact sum: as with all of them loaded, in one file.",
    "svd": "The same sum without ranks that add nothing.",
    "dare": "DARE: half of the entries go, the rest is doubled.",
    "tsv": "TSV: what LoRAs share acts once. For versions of one subject.",
    "lego": "LoRA-LEGO: ranks that are alike become one.",
    "np": "NP-LoRA: first the subject, then the style, which stays as it is.",
    "k-lora": "K-LoRA: first the subject, then the style; each layer takes mostly one of them.",
}
"""Ways of merging files that need neither images nor PEFT, with what they do."""

DRAFT_PREVIEW = (
    "Shows where draft would let each LoRA act, for the price of the drafted steps: the division of the image, then "
    "where the model looks for each subject. With the settings of the KSampler, it is divided in the same way there."
)
REFINE = "Repaints each subject alone, enlarged, with its LoRA. Nothing outside of its box or mask changes."
REFINED_TEXT = "The text of the image, with the triggers. Each subject's text is made of it, or is its prompt."
REFINED_SIZE = (
    "The longer side at which a subject is repainted: that of images of the model, 512 for Stable Diffusion 1.x, 1024 "
    "for SDXL and FLUX."
)
REFINED_MASKS = "One for each concept, in their order, from Draft preview. Empty: the boxes and masks of the concepts."
DENOISE = "How much of the noise is added again: higher values change more."
MERGE = "Merges the LoRAs of all concepts, with their weights, into one file. Triggers and places are not in it."
MERGED_NAME = "Name in ComfyUI's output folder; a number is added. Files in loras/ there are in the list of LoRAs."
INSPECT = "Shows what a LoRA file is: its format, the model it is for, its words and ranks."

CONCEPT = "A LoRA with the words and the place of its subject. Chain concepts, then connect the last one to Compose."
NO_LORA = "none (a subject without a LoRA)"
"""The choice of a concept that has no file; workflows keep it, so it stays as it is."""
LORA = (
    "The LoRA of the subject. none: a subject of the model itself, named in the text by its class word; the LoRAs of "
    "other subjects keep off its place."
)
TRIGGER = "The word that the LoRA was trained with. Write it in the text where its subject is meant."
CLASS_WORD = "What the subject is, for example cat; it follows the trigger in the text."
WEIGHT = "How strongly the LoRA acts."
SCHEDULE = (
    "A weight that changes over the steps, instead of the weight above: 1..0.4 falls linearly, 0:1,0.5:0 is off in the "
    "second half, 1,0.5,0 sets equal parts."
)
BOX = (
    "Where the subject is: left,top,right,bottom as fractions of the image, for example 0,0.1,0.5,0.9. Empty: anywhere."
)
MASK = "Where the subject is, painted white, instead of a box. Of several masks, the first counts."
MASKS = "The boxes and masks of all concepts, in their order; white without one. Those of a draft: Draft preview."
BOXES = "A box for each concept, in their order, one a line: left,top,right,bottom as fractions of the image; or none."
TEXT = "What the image shows, with the triggers of the concepts. Weights in brackets are read as in CLIP Text Encode."
PROMPT = "What its region reads, with the trigger. Empty: a text is made of that of Compose where one is needed."
TEXTS = (
    "What regions read. shared: all read the text. regions: each reads one about its subject. auto: regions where a "
    "concept has a prompt, and in draft on models with cross-attention (UNets and Anima) where a subject without a "
    "LoRA shares the class word of another; otherwise shared."
)
