//! One decoder layer: its weights, how they are loaded, what it computes. Which of its parts a model has is in
//! [`ModelSpec`]; there is one layer for all families.

use super::ModelSpec;
use super::file::ModelFile;
use super::spec::layer_tensor;
use super::workspace::Workspace;
use crate::device::batch::Batch;
use crate::device::{AfterAttention, AttentionSpec, BeforeAttention, Device, Experts, HeadNorms, QkvExtra};
use crate::tensor::Tensor;
use anyhow::{Result, ensure};

/// Weights of one layer.
pub(super) struct Layer<D: Device> {
    /// `[width]`
    attn_norm: D::Vector,
    /// `[(n_heads + 2 · n_kv_heads) · head_dim, width]`
    qkv: D::Weight,
    qkv_extra: QkvExtra<D::Vector>,
    /// `[width, n_heads · head_dim]`
    attn_output: D::Weight,
    /// `[width]`
    post_attn_norm: Option<D::Vector>,
    /// `[width]`
    ffn_norm: D::Vector,
    ffn: FeedForward<D::Weight>,
    /// `[width]`
    post_ffn_norm: Option<D::Vector>,
}

/// The second half of a layer.
enum FeedForward<W> {
    Dense {
        /// `[2 · ffn_width, width]`, in the device's order
        gate_up: W,
        /// `[width, ffn_width]`
        down: W,
    },
    Experts(Experts<W>),
}

impl<D: Device> Layer<D> {
    pub(super) fn load(dev: &D, spec: &ModelSpec, file: &dyn ModelFile, layer: usize) -> Result<Self> {
        let tensor = |part: &str| file.tensor(&layer_tensor(layer, part));
        let tensors = |parts: &[&str]| parts.iter().map(|part| tensor(part)).collect::<Result<Vec<Tensor<'_>>>>();
        let vector = |part: &str| dev.load_vector(&[tensor(part)?]);
        let some = |wanted: bool, part: &str| if wanted { vector(part).map(Some) } else { Ok(None) };
        let qkv = if spec.fused { &["attn_qkv.weight"][..] } else { &["attn_q.weight", "attn_k.weight", "attn_v.weight"] };
        let bias = spec.qkv_bias.then(|| dev.load_vector(&tensors(&["attn_q.bias", "attn_k.bias", "attn_v.bias"])?));
        let head_norms = || -> Result<_> {
            Ok(HeadNorms { q: vector("attn_q_norm.weight")?, k: vector("attn_k_norm.weight")?, eps: spec.norm_eps })
        };
        Ok(Self {
            attn_norm: vector("attn_norm.weight")?,
            qkv: dev.load_weight(&tensors(qkv)?)?,
            qkv_extra: QkvExtra { bias: bias.transpose()?, norms: spec.head_norms.then(head_norms).transpose()? },
            attn_output: dev.load_weight(&[tensor("attn_output.weight")?])?,
            post_attn_norm: some(spec.post_norms, "post_attention_norm.weight")?,
            ffn_norm: vector("ffn_norm.weight")?,
            ffn: FeedForward::load(dev, spec, &tensor)?,
            post_ffn_norm: some(spec.post_norms, "post_ffw_norm.weight")?,
        })
    }

    /// Adds what the layer makes of `ws.x` to it.
    #[expect(clippy::too_many_arguments, reason = "the whole of a layer's surroundings")]
    pub(super) fn forward(
        &self,
        dev: &D,
        spec: &ModelSpec,
        attention: &AttentionSpec,
        batch: &Batch,
        cache: &mut D::Cache,
        ws: &mut Workspace<D>,
    ) {
        let eps = spec.norm_eps;
        let before = BeforeAttention { norm: &self.attn_norm, eps, qkv: &self.qkv, extra: &self.qkv_extra };
        dev.before_attention(&before, attention, batch, &ws.x, &mut ws.normed, &mut ws.qkv, cache);
        dev.attention(&ws.qkv, attention, cache, &self.attn_output, batch, &mut ws.attended);
        if let (FeedForward::Dense { gate_up, down }, None, None) = (&self.ffn, &self.post_attn_norm, &self.post_ffn_norm) {
            let (attn_output, norm, activation) = (&self.attn_output, &self.ffn_norm, spec.activation);
            let after = AfterAttention { attn_output, norm, eps, gate_up, activation, down };
            return dev.after_attention(&after, &ws.attended, batch, &mut ws.x, &mut ws.normed, &mut ws.gate_up, &mut ws.gated);
        }
        let branch = (&mut ws.branch, &mut ws.x);
        add(dev, &ws.attended, &self.attn_output, self.post_attn_norm.as_ref().map(|norm| (norm, eps)), batch, branch);
        match &self.ffn {
            FeedForward::Dense { gate_up, down } => {
                dev.norm(&ws.x, &self.ffn_norm, eps, gate_up, batch, &mut ws.normed);
                dev.gate_up(&ws.normed, gate_up, spec.activation, down, batch, &mut ws.gate_up, &mut ws.gated);
                let branch = (&mut ws.branch, &mut ws.x);
                add(dev, &ws.gated, down, self.post_ffn_norm.as_ref().map(|norm| (norm, eps)), batch, branch);
            }
            FeedForward::Experts(experts) => {
                dev.norm(&ws.x, &self.ffn_norm, eps, &experts.experts[0].gate_up, batch, &mut ws.normed);
                dev.experts(&ws.normed, experts, spec.activation, batch, &mut ws.x);
            }
        }
    }
}

/// x += weight · act, normed before it is added if there is a norm for it.
fn add<D: Device>(
    dev: &D,
    act: &D::Act,
    weight: &D::Weight,
    norm: Option<(&D::Vector, f32)>,
    batch: &Batch,
    (branch, x): (&mut D::Hidden, &mut D::Hidden),
) {
    match norm {
        None => dev.linear_add(act, weight, batch, x),
        Some((norm, eps)) => {
            dev.linear(act, weight, batch, branch);
            dev.norm_add(branch, norm, eps, batch, x);
        }
    }
}

impl<W> FeedForward<W> {
    fn load<'f, D: Device<Weight = W>>(dev: &D, spec: &ModelSpec, tensor: &dyn Fn(&str) -> Result<Tensor<'f>>) -> Result<Self> {
        let Some(experts) = spec.experts else {
            let up = tensor("ffn_up.weight")?;
            let n = spec.ffn_width;
            let (gate, up) = if spec.fused { (up.rows(0..n), up.rows(n..2 * n)) } else { (tensor("ffn_gate.weight")?, up) };
            let down = dev.load_weight(&[tensor("ffn_down.weight")?])?;
            return Ok(Self::Dense { gate_up: dev.load_gate_up(&gate, &up)?, down });
        };
        let part = |part: &str, e: usize| {
            if experts.stacked {
                Ok(tensor(&format!("{part}_exps.weight"))?.entry(e))
            } else {
                tensor(&format!("{part}.{e}.weight"))
            }
        };
        let expert = |e| dev.load_expert(&part("ffn_gate", e)?, &part("ffn_up", e)?, &part("ffn_down", e)?);
        let router = tensor("ffn_gate_inp.weight")?;
        ensure!(router.dtype.block_elements() == 1, "{}: a router of type {:?} is not supported", router.name, router.dtype);
        let experts = Experts {
            router: dev.load_weight(&[router])?,
            experts: (0..experts.sizes.n_experts).map(expert).collect::<Result<_>>()?,
            n_used: experts.sizes.n_used,
            renormalise: experts.renormalise,
        };
        dev.check_experts(&experts)?;
        Ok(Self::Experts(experts))
    }
}
