"""Control images: a ControlNet or a T2I-Adapter beside concepts.

With w for the scale of a control, or that of a region inside it, at step t of latents z and a text c:

    ControlNet:   skip connection k, or the mid block,  +=  w r_k(z, t, c, image)
    T2I-Adapter:  output of down block k                +=  w f_k(image)

Zhang et al., "Adding Conditional Control to Text-to-Image Diffusion Models", arXiv 2302.05543; Mou et al.,
"T2I-Adapter", arXiv 2302.08453. `docs/control.md` explains how both combine with concepts.
"""
