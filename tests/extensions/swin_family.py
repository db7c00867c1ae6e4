"""A backbone family: Swin (Liu et al., ICCV 2021), hierarchical stages of attention in shifted windows."""

from tracknet.models.families import FAMILIES, HierarchicalFamily


class SwinFamily(HierarchicalFamily):
    def layers(self, hf):
        # A stage ends with its downsampling; its map is what its last block puts out.
        return [stage.blocks[-1] for stage in hf.encoder.layers]

    def blocks(self, hf):
        return [block for stage in hf.encoder.layers for block in stage.blocks]

    def channels(self, config):
        return [config.embed_dim * 2**i for i in range(len(config.depths))]

    def feature_map(self, hf, output, grid_hw):
        return super().feature_map(hf, output, grid_hw).transpose(1, 2).unflatten(-1, grid_hw)


FAMILIES.register(
    "swin",
    # transformers would shrink windows that are larger than a map, and then lack position biases for them.
    SwinFamily("encoder.layers", init_kwargs={"add_pooling_layer": False}, forward_kwargs={"always_partition": True}),
)
