"""What the nodes say, in the words of the page; a test compares them, since the page's module loads diffusers."""

METHODS = {
    "draft": "A few first steps show where the model puts each subject, and each LoRA acts there. Needs no boxes.",
    "regional": "Each LoRA acts in its box only. Nothing moves the subjects into their boxes.",
    "tara": "Each LoRA acts on its own trigger. Best for LoRAs that were trained with TARA.",
    "merge": "All LoRAs act everywhere, as in most tools. Subjects may blend.",
}
"""The methods, with what they do."""

CONCEPT = "A LoRA with the words and the place of its subject. Chain concepts, then connect the last one to Compose."
TRIGGER = "The word that the LoRA was trained with. Write it in the text where its subject is meant."
CLASS_WORD = "What the subject is, for example cat; it follows the trigger in the text."
WEIGHT = "How strongly the LoRA acts."
BOX = (
    "Where the subject is: left,top,right,bottom as fractions of the image, for example 0,0.1,0.5,0.9. Empty: anywhere."
)
MASK = "Where the subject is, painted white, instead of a box."
BOXES = "A box for each concept, in their order, one a line: left,top,right,bottom as fractions of the image; or none."
TEXT = "What the image shows, with the triggers of the concepts. Weights in brackets are read as in CLIP Text Encode."
PROMPT = "What its region reads, with the trigger. Empty: a text is made of that of Compose where one is needed."
TEXTS = (
    "What regions read. shared: all read the text. regions: each reads one about its subject. auto: regions where a "
    "concept has a prompt, in regional on models without cross-attention (FLUX and most others), and in draft where "
    "subjects share a class word; otherwise shared."
)
