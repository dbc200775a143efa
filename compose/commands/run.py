"""`lora-compose run`: generates images of a scene."""

from lora_compose.compose.commands import options
from lora_compose.compose.commands.asked import asked_run, seeds_of
from lora_compose.compose.support.terminal import handle_errors, starting


@handle_errors()
def run(
    model: options.ModelArgument,
    prompt: options.PromptOption = None,
    lora: options.LoraOption = None,
    box: options.BoxOption = None,
    concept: options.ConceptOption = None,
    loras: options.LorasOption = None,
    scene: options.SceneOption = None,
    method: options.MethodOption = None,
    settings: options.SetOption = None,
    seed: options.SeedsOption = None,
    steps: options.StepsOption = None,
    guidance: options.GuidanceOption = None,
    negative_prompt: options.NegativeOption = None,
    width: options.WidthOption = None,
    height: options.HeightOption = None,
    image: options.ImageOption = None,
    reference: options.ReferenceOption = None,
    mask_image: options.MaskImageOption = None,
    strength: options.StrengthOption = None,
    padding_mask_crop: options.PaddingOption = None,
    paste_original: options.PasteOption = None,
    control: options.ControlOption = None,
    ip_adapter: options.IPAdapterOption = None,
    scheduler: options.SchedulerOption = None,
    dtype: options.DtypeOption = None,
    quantize: options.QuantizeOption = None,
    variant: options.VariantOption = None,
    device: options.DeviceOption = None,
    savers: options.SaversOption = None,
    out: options.OutOption = options.OUT,
    maps: options.MapsOption = False,
) -> None:
    """Generate images: one per seed, and a contact sheet of several."""
    asked = asked_run(locals())
    seeds = seeds_of(seed)
    with starting():
        from lora_compose.compose.generate.images import make_images
    make_images(asked, seeds, out, savers or (), loras=loras, maps=maps, variant=variant)
