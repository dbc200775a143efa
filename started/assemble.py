import torch, sys
from pathlib import Path
from recipe.unet import new_pipeline
from safetensors.torch import load_file
s=Path('started'); p=new_pipeline(s/'vae', s/'tokenizer')
print(p.unet.load_state_dict({k:v.float() for k,v in load_file('unet84.safetensors').items()}))
print(p.text_encoder.load_state_dict({k:v.float() for k,v in load_file(s/'text_encoder/model.safetensors').items()}, strict=False))
p.save_pretrained('model84'); 
