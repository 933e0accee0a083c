"""What is particular to single mechanisms: their options, what they keep, and what they refuse."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from adala.attention import AttentionShape, TokenLayout, build_mixer, full_precision, resolve_mechanism
from adala.attention.softmax import softmax_attention_reference
from adala.conversion import LoraSpec
from baselines.hedgehog import hedgehog_features
from baselines.nystromformer import iterative_pinv, segment_means

LAYOUT = TokenLayout((5, 7), 1)
SHAPE = AttentionShape(num_heads=3, head_dim=8, layout=LAYOUT)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("hedgehog", {"activation": "relu"}),
        ("hedgehog", {"feature_dim": 0}),
        ("linformer", {"init": "zeros"}),
        ("linformer", {"num_landmarks": 0}),
        ("performer", {"mode": "log"}),
        ("performer", {"num_features": 0}),
        ("performer", {"row_norms": "unit"}),
        ("performer", {"redraw_interval": -1}),
        ("cosformer", {"prefix_position": "last"}),
        ("nystromformer", {"num_landmarks": 0}),
        ("nystromformer", {"pinv_init": "none"}),
        ("nystromformer", {"conv_kernel": 4}),
        ("monarch", {"block_size": 0}),
        ("monarch", {"num_steps": 0}),
        ("monarch", {"padding_side": "both"}),
    ],
    ids=str,
)
def test_an_impossible_option_is_named(name, options):
    with pytest.raises(ValueError, match=f"option {next(iter(options))} is "):
        build_mixer(name, SHAPE, options)


class TestHedgehog:
    def test_starts_at_the_identity(self, packed_qkv):
        mixer = build_mixer("hedgehog", SHAPE).double()
        q, k, _ = packed_qkv(LAYOUT)
        query_features, key_features = mixer.feature_maps(q, k)
        for features, x in ((query_features, q), (key_features, k)):
            expected = torch.cat((x[..., :4].softmax(-1), (-x[..., :4]).softmax(-1)), dim=-1)
            torch.testing.assert_close(features, expected)

    def test_features_are_float32_and_clamped_for_bfloat16_inputs(self, packed_qkv):
        q, k, _ = (100 * x.bfloat16() for x in packed_qkv(LAYOUT))
        for features in build_mixer("hedgehog", SHAPE).feature_maps(q, k):
            assert features.dtype == torch.float32
            assert features.min() == torch.tensor(1e-12)

    def test_exp_features_have_a_largest_entry_of_one_in_each_half(self, packed_qkv):
        x, _, _ = packed_qkv(LAYOUT)
        features = hedgehog_features(x, torch.randn(3, 8, 4), "exp")
        for half in features.split(4, dim=-1):
            assert torch.equal(half.amax(-1), torch.ones_like(half[..., 0]))

    def test_tied_maps_are_one_parameter(self):
        mixer = build_mixer("hedgehog", SHAPE, {"tied": True})
        assert [name for name, _ in mixer.named_parameters()] == ["query_weight"]

    def test_native_conversions_of_hedgehog_and_lolcats(self):
        hedgehog, lolcats = (resolve_mechanism(name).native_conversion for name in ("hedgehog", "lolcats"))
        for conversion, loss in ((hedgehog, "attention_map_cross_entropy"), (lolcats, "head_output_mse_1000")):
            step = conversion.step("attention_alignment")
            assert (step.loss, step.lr, step.weight_decay) == (loss, 1e-2, 0.0)
            assert step.trainable == ("blocks.*.attn.token_mixer.*",)
        assert lolcats.step("finetuning").lora == LoraSpec(rank=8, alpha=16.0)
        assert lolcats.step("finetuning").lr == 1e-4
        assert hedgehog.step("finetuning").lora is None


class TestLinformer:
    def test_starts_at_the_means_of_uneven_segments(self):
        mixer = build_mixer("linformer", AttentionShape(3, 8, TokenLayout((1, 10), 1)), {"num_landmarks": 4})
        x = torch.randn(11, 8)
        expected = torch.stack([x[:2].mean(0), x[2:5].mean(0), x[5:8].mean(0), x[8:].mean(0)])
        for projection in (mixer.key_projection, mixer.value_projection):
            torch.testing.assert_close(projection.t() @ x, expected)

    def test_never_more_rows_than_tokens(self, packed_qkv):
        layout = TokenLayout((2, 3), 1)
        mixer = build_mixer("linformer", AttentionShape(3, 8, layout)).double()
        q, k, v = packed_qkv(layout)
        assert mixer.key_projection.shape == (7, 7)
        torch.testing.assert_close(mixer(q, k, v, layout), softmax_attention_reference(q, k, v))

    def test_more_tokens_are_refused_until_resized(self, packed_qkv):
        mixer, larger = build_mixer("linformer", SHAPE).double(), TokenLayout((6, 7), 1)
        inputs = packed_qkv(larger)
        with pytest.raises(ValueError, match=r"43 tokens.*36.*resize"):
            mixer(*inputs, larger)
        mixer.resize(larger)
        assert mixer(*inputs, larger).shape == inputs[2].shape

    @pytest.mark.parametrize("num_prefix_tokens", [0, 1, 5])
    def test_resize_keeps_prefix_rows_and_the_sum_over_patches(self, num_prefix_tokens):
        """Doubling a grid leaves K~ of an image of equal patches as it was: twice the tokens, half the weight."""
        old = TokenLayout((3, 4), num_prefix_tokens)
        new = TokenLayout((6, 8), num_prefix_tokens)
        mixer = build_mixer("linformer", AttentionShape(1, 8, old), {"num_landmarks": 5, "init": "uniform"})
        before = mixer.key_projection.detach().clone()
        mixer.resize(new)
        after = mixer.key_projection.detach()
        assert after.shape == (new.num_tokens, 5)
        assert torch.equal(after[:num_prefix_tokens], before[:num_prefix_tokens])
        torch.testing.assert_close(after[num_prefix_tokens:].sum(0), before[num_prefix_tokens:].sum(0))
        # The grid's corner has no neighbours to blend with outside, so it keeps its value but for the rescaling.
        torch.testing.assert_close(after[num_prefix_tokens], before[num_prefix_tokens] / 4)

    def test_resize_to_the_same_grid_changes_nothing(self):
        mixer = build_mixer("linformer", SHAPE, {"init": "uniform"})
        before = copy.deepcopy(mixer.state_dict())
        mixer.resize(LAYOUT)
        assert all(torch.equal(value, before[key]) for key, value in mixer.state_dict().items())

    def test_resize_keeps_frozen_parameters_frozen(self):
        mixer = build_mixer("linformer", SHAPE).requires_grad_(False)
        mixer.resize(TokenLayout((6, 7), 1))
        assert not any(parameter.requires_grad for parameter in mixer.parameters())

    def test_resize_refuses_another_number_of_prefix_tokens(self):
        with pytest.raises(ValueError, match="5 prefix tokens"):
            build_mixer("linformer", SHAPE).resize(TokenLayout((5, 7), 5))


class TestPerformer:
    def test_projection_is_a_function_of_the_global_seed_and_the_option(self):
        def draw(global_seed, seed):
            torch.manual_seed(global_seed)
            return build_mixer("performer", SHAPE, {"seed": seed}).projection

        assert torch.equal(draw(0, 0), draw(0, 0))
        assert not torch.equal(draw(0, 0), draw(1, 0))
        assert not torch.equal(draw(0, 0), draw(0, 1))

    def test_layers_of_a_model_differ(self):
        first, second = (build_mixer("performer", SHAPE) for _ in range(2))
        assert not torch.equal(first.projection, second.projection)

    def test_rows_are_orthogonal_within_blocks(self):
        projection = build_mixer("performer", SHAPE, {"num_features": 20, "row_norms": "constant"}).projection
        assert projection.shape == (20, 8)
        for block in projection.split(8):
            torch.testing.assert_close(block @ block.t(), 8 * torch.eye(len(block)), atol=1e-4, rtol=0)

    def test_gaussian_rows_have_the_norms_of_gaussian_vectors(self):
        shape = AttentionShape(1, 64, LAYOUT)
        norms = build_mixer("performer", shape, {"num_features": 4096}).projection.norm(dim=1)
        assert abs(float(norms.square().mean()) - 64) < 1.5
        assert norms.std() > 0.5

    def test_many_features_estimate_softmax_attention(self, packed_qkv):
        q, k, v = packed_qkv(LAYOUT)
        q, k = q / 2, k / 2  # the estimate's variance grows exponentially with the squared norms
        expected = softmax_attention_reference(q, k, v)
        errors = []
        for num_features in (16, 4096):
            torch.manual_seed(3)
            mixer = build_mixer("performer", SHAPE, {"num_features": num_features}).double()
            errors.append(float((mixer(q, k, v, LAYOUT) - expected).norm() / expected.norm()))
        assert errors[1] < errors[0] / 5
        assert errors[1] < 0.1

    def test_stable_mode_survives_norms_at_which_the_original_is_all_epsilon(self, packed_qkv):
        q, k, v = packed_qkv(LAYOUT)
        q, k = 20 * q, 20 * k
        torch.manual_seed(4)
        stable = build_mixer("performer", SHAPE).double()
        original = build_mixer("performer", SHAPE, {"mode": "max"}).double()
        original.load_state_dict(stable.state_dict())
        uniform = v.mean(dim=-2, keepdim=True).expand_as(v)
        single = stable.float()(q.float(), k.float(), v.float(), LAYOUT)
        double = stable.double()(q, k, v, LAYOUT)
        torch.testing.assert_close(single.double(), double, atol=1e-3, rtol=0)
        assert (original(q, k, v, LAYOUT) - uniform).norm() < 0.5 * uniform.norm()
        assert (double - uniform).norm() > uniform.norm()

    def test_stable_mode_survives_queries_whose_feature_no_key_shares(self):
        """Keys opposite to the queries: with one maximum for all features, every product would underflow to 0 / 0."""
        mixer = build_mixer("performer", SHAPE)
        direction = mixer.projection[0] / mixer.projection[0].norm()
        generator = torch.Generator().manual_seed(6)
        noise, v = torch.randn(2, 1, 3, LAYOUT.num_tokens, 8, generator=generator)
        q, k = 100 * direction + noise, -100 * direction + noise.flip(2)
        out = mixer(q, k, v, LAYOUT)
        assert out.isfinite().all()
        expected = mixer.double()(q.double(), k.double(), v.double(), LAYOUT)
        torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=0)

    def test_redraws_every_so_many_optimizer_steps_however_many_forward_passes(self, packed_qkv):
        options = {"redraw_interval": 2}
        inputs = packed_qkv(LAYOUT)

        def train(mixer, steps, micro_batches):
            projections = []
            for step in steps:
                mixer.begin_step(step)
                for _ in range(micro_batches):
                    mixer(*inputs, LAYOUT)
                projections.append(mixer.projection)
            return projections

        mixer, cut = (
            build_mixer("performer", SHAPE, options).double(),
            build_mixer("performer", SHAPE, options).double(),
        )
        cut.load_state_dict(mixer.state_dict())
        first, second, third = train(mixer, range(3), 1)
        assert torch.equal(first, second)
        assert not torch.equal(second, third)
        assert all(torch.equal(a, b) for a, b in zip([first, second, third], train(cut, range(3), 4), strict=True))
        resumed = build_mixer("performer", SHAPE, options).double()
        resumed.load_state_dict(mixer.state_dict())
        for expected, actual in zip(train(mixer, range(3, 7), 1), train(resumed, range(3, 7), 1), strict=True):
            assert torch.equal(expected, actual)

    def test_a_redraw_between_forward_and_backward_leaves_gradients_right(self, packed_qkv):
        mixer = build_mixer("performer", SHAPE, {"redraw_interval": 1}).double()
        q, k, v = (x.detach().requires_grad_() for x in packed_qkv(LAYOUT))
        out = mixer(q, k, v, LAYOUT)
        fixed = copy.deepcopy(mixer).eval()
        mixer.begin_step(1)
        assert not torch.equal(mixer.projection, fixed.projection)
        (gradient,) = torch.autograd.grad(out.sum(), q)
        (expected,) = torch.autograd.grad(fixed(q, k, v, LAYOUT).sum(), q)
        assert torch.equal(gradient, expected)

    def test_by_default_the_state_is_the_projection_alone(self):
        assert list(build_mixer("performer", SHAPE).state_dict()) == ["projection"]


class TestCosformer:
    def test_a_query_without_a_positive_entry_returns_exactly_zero(self, packed_qkv):
        q, k, v = (x.clone() for x in packed_qkv(LAYOUT))
        q[0, 1, 4] = -q[0, 1, 4].abs()
        out = build_mixer("cosformer", SHAPE)(q, k, v, LAYOUT)
        assert torch.equal(out[0, 1, 4], torch.zeros(8, dtype=torch.float64))
        assert (out.abs().sum(-1) == 0).sum() == 1

    def test_middle_prefix_tokens_stand_at_half_the_length(self, packed_qkv):
        """cos((pi/2)(1/2 - i/N)) for the class token's query against every patch."""
        q, k, v = packed_qkv(LAYOUT)
        out = build_mixer("cosformer", SHAPE, {"prefix_position": "middle"})(q, k, v, LAYOUT)
        position = torch.arange(1, 37, dtype=torch.float64) / 36
        position[0] = 0.5
        weights = (q[:, :, :1].relu() @ k.relu().transpose(-2, -1)) * (math.pi / 2 * (0.5 - position)).cos()
        expected = weights / weights.sum(-1, keepdim=True) @ v
        torch.testing.assert_close(out[:, :, :1], expected)


class TestNystromformer:
    def test_segments_are_even_with_the_shorter_ones_first(self):
        x = torch.arange(11.0)[:, None]
        assert segment_means(x, 4)[:, 0].tolist() == [0.5, 3.0, 6.0, 9.0]
        assert segment_means(x[:8], 4)[:, 0].tolist() == [0.5, 2.5, 4.5, 6.5]

    @pytest.mark.parametrize("num_landmarks", [36, 64])
    def test_no_more_tokens_than_landmarks_is_exact_softmax(self, num_landmarks, packed_qkv):
        q, k, v = packed_qkv(LAYOUT)
        mixer = build_mixer("nystromformer", SHAPE, {"num_landmarks": num_landmarks})
        torch.testing.assert_close(mixer(q, k, v, LAYOUT), softmax_attention_reference(q, k, v))

    def test_the_convolution_starts_at_zero_and_also_joins_the_exact_case(self, packed_qkv):
        q, k, v = packed_qkv(LAYOUT)
        mixer = build_mixer("nystromformer", SHAPE, {"conv_kernel": 3}).double()
        exact = softmax_attention_reference(q, k, v)
        torch.testing.assert_close(mixer(q, k, v, LAYOUT), exact)
        with torch.no_grad():
            mixer.conv_weight[1, 0, 2, 0] = 1  # the next token's value, on the second head alone
        shifted = F.pad(v[:, 1, 1:], (0, 0, 0, 1))
        torch.testing.assert_close(mixer(q, k, v, LAYOUT)[:, 1], exact[:, 1] + shifted)

    def test_iterations_approach_the_inverse(self):
        generator = torch.Generator().manual_seed(5)
        scores = torch.randn(2, 3, 6, 6, generator=generator, dtype=torch.float64)
        matrix = (3 * torch.eye(6, dtype=torch.float64) + scores).softmax(-1)
        torch.testing.assert_close(iterative_pinv(matrix, 20), torch.linalg.inv(matrix))

    def test_global_start_depends_on_the_batch_and_the_default_does_not(self, packed_qkv):
        q, k, v = packed_qkv(LAYOUT)
        mixer = build_mixer("nystromformer", SHAPE, {"num_landmarks": 8, "pinv_init": "global"})
        alone = torch.cat([mixer(*(x[i : i + 1] for x in (q, k, v)), LAYOUT) for i in range(2)])
        assert not torch.allclose(mixer(q, k, v, LAYOUT), alone, rtol=1e-6)


class TestMonarch:
    @pytest.mark.parametrize("num_prefix_tokens", [0, 1, 5])
    def test_default_blocks_are_as_wide_as_the_grid(self, num_prefix_tokens, packed_qkv):
        layout = TokenLayout((4, 7), num_prefix_tokens)
        inputs = packed_qkv(layout)
        out = build_mixer("monarch", SHAPE)(*inputs, layout)
        assert torch.equal(out, build_mixer("monarch", SHAPE, {"block_size": 7})(*inputs, layout))
        assert not torch.allclose(out, build_mixer("monarch", SHAPE, {"block_size": 4})(*inputs, layout))

    @pytest.mark.parametrize("num_prefix_tokens", [0, 1, 5])
    def test_blocks_begin_with_image_rows(self, num_prefix_tokens, packed_qkv):
        """Keys with their values may be shuffled within a block: within one image row, but not across two."""
        layout = TokenLayout((4, 7), num_prefix_tokens)
        q, k, v = packed_qkv(layout)
        mixer = build_mixer("monarch", SHAPE, {"num_steps": 3})
        expected = mixer(q, k, v, layout)

        def shuffled(start):
            order = torch.arange(layout.num_tokens)
            order[start : start + 7] = order[start : start + 7].flip(0)
            return mixer(q, k[:, :, order], v[:, :, order], layout)

        second_row = num_prefix_tokens + 7
        torch.testing.assert_close(shuffled(second_row), expected)
        assert not torch.allclose(shuffled(second_row + 1), expected)

    def test_blocks_as_large_as_the_image_are_exact_softmax(self, packed_qkv):
        q, k, v = packed_qkv(LAYOUT)
        for eps in (1e-12, None):
            mixer = build_mixer("monarch", SHAPE, {"block_size": 36, "num_steps": 1, "eps": eps})
            torch.testing.assert_close(mixer(q, k, v, LAYOUT), softmax_attention_reference(q, k, v))

    @pytest.mark.parametrize("eps", [1e-12, None])
    def test_one_block_with_padding_has_finite_gradients(self, eps, packed_qkv):
        inputs = [x.detach().requires_grad_() for x in packed_qkv(LAYOUT)]
        out = build_mixer("monarch", SHAPE, {"block_size": 40, "eps": eps})(*inputs, LAYOUT)
        torch.testing.assert_close(out, softmax_attention_reference(*inputs))
        out.square().sum().backward()
        assert all(x.grad.isfinite().all() for x in inputs)

    def test_guards_change_nothing_at_unit_scale(self, packed_qkv):
        q, k, v = packed_qkv(LAYOUT)
        guarded, exact = (build_mixer("monarch", SHAPE, {"eps": eps}) for eps in (1e-12, None))
        torch.testing.assert_close(guarded(q, k, v, LAYOUT), exact(q, k, v, LAYOUT), rtol=0, atol=1e-9)


class TestFullPrecision:
    def test_autocast_is_off_inside_and_on_again_after(self):
        x = torch.randn(4, 4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with full_precision(x):
                assert (x @ x).dtype == torch.float32
            assert (x @ x).dtype == torch.bfloat16

    @pytest.mark.parametrize("raised", [False, True])
    def test_tf32_is_off_inside_and_on_again_after_even_an_error(self, raised):
        """On a tensor that only says it is on CUDA, since the switch is there without a device, too."""

        class OnCuda:
            device = torch.device("cuda")

        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            try:
                with full_precision(OnCuda()):
                    inside = torch.backends.cuda.matmul.fp32_precision
                    if raised:
                        raise KeyError("from within")
            except KeyError:
                assert raised
            assert inside == "ieee"
            assert torch.backends.cuda.matmul.allow_tf32
            assert torch.get_float32_matmul_precision() == "high"
        finally:
            torch.set_float32_matmul_precision(before)

    def test_the_switch_is_not_touched_for_the_cpu(self):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            with full_precision(torch.zeros(1)):
                assert torch.backends.cuda.matmul.allow_tf32
        finally:
            torch.set_float32_matmul_precision(before)
