"""Stores an unfinished denoiser compactly: int8 by row, and restores it."""
import sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
def pack(src, dst):
    out={}
    for k,v in load_file(src).items():
        v=v.float()
        if v.ndim<2: out[k]=v.half(); continue
        m=v.flatten(1); s=m.abs().amax(1,keepdim=True).clamp(min=1e-12)/31
        out[k]=(m/s).round().to(torch.int8).view_as(v); out[k+'.scale']=s.squeeze(1)
    save_file(out,dst)
def unpack(src,dst):
    t=load_file(src); out={}
    for k,v in t.items():
        if k.endswith('.scale'): continue
        out[k]=v if v.dtype!=torch.int8 else (v.float().flatten(1)*t[k+'.scale'][:,None]).view_as(v).half()
    save_file(out,dst)
{'pack':pack,'unpack':unpack}[sys.argv[1]](*sys.argv[2:])
