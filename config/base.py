"""All configuration keys with their meaning and default.

Presets (config/nft.py) start from ``get_config()``.  The tree is locked: misspelt keys are errors.
``diffusion_nft/validation/schema.py`` defines valid values and checks them before any model is
loaded.  Every key can be set on the command line: ``--config.train.learning_rate=1e-4``.

The default of a new key must not change the numbers: a run of an earlier version, whose files lack
the key, is continued with the default.
"""

import ml_collections
from ml_collections import config_dict


def get_config() -> ml_collections.ConfigDict:
    """The defaults: SD3.5-Medium at 512 px, published hyper-parameters, no prompts or rewards."""
    config = ml_collections.ConfigDict()

    # Name shown in wandb; empty: the last part of save_dir.
    config.run_name = ""
    # The run directory.  The same command continues the run in it.
    config.save_dir = ""
    # All randomness of training is a function of (seed, epoch, sample, purpose), not of ranks or
    # batch sizes.
    config.seed = 42
    # The loss: a name in diffusion_nft.algorithms.ALGORITHMS.
    config.algorithm = "nft"
    # One epoch = sample, score, train, update the old policy.  With stages, the maximum in total.
    config.num_epochs = 100_000
    # A run in stages: a tuple of mappings, one per stage, with its "num_epochs" and changes of
    # the values below by dotted key: dataset, reward_fn (as a whole), sample.*, nft.*, grpo.*,
    # matching.*, eval.* and train.*, except train.lora_* and train.adam_*.
    #     config.stages = (
    #         {"num_epochs": 800},
    #         {"num_epochs": 300, "dataset": "geneval", "reward_fn": {"geneval": 1.0}},
    #     )
    # The run ends at the sum of their epochs, or at the num_epochs above if that is less.  Weights,
    # optimizer, EMA and the counts of epochs and steps, on which the schedules depend, continue.
    config.stages = ()
    # Epochs between checkpoints, and between evaluations (0: only at the end).
    config.save_freq = 30
    config.eval_freq = 10
    # Precision of the frozen weights and of autocast: fp16, bf16, no (fp32) or fp64 (for checks).
    config.mixed_precision = "fp16"
    # TF32 matrix products on GPUs that support them.
    config.allow_tf32 = True
    # Start from the policies of another run (a checkpoint or a run directory) with new counters and
    # optimizer.  Ignored if save_dir already contains checkpoints.
    config.resume_from = ""

    config.pretrained = pretrained = ml_collections.ConfigDict()
    # A diffusers folder or hub name.  "shapes" is the built-in model.
    pretrained.model = "stabilityai/stable-diffusion-3.5-medium"
    # Branch, tag or commit on the hub; empty: the default branch.
    pretrained.revision = ""
    # The family of the model: a name in diffusion_nft.models.MODELS; empty: as its files say.
    pretrained.model_type = ""
    # Tokens per prompt (CLIP always uses 77).
    pretrained.max_sequence_length = 128
    # Guidance value that is an input of the transformer (FLUX.1-dev), the same in rollouts, losses
    # and evaluation.  Other models ignore it.
    pretrained.embedded_guidance = 3.5
    # Accept models distilled to few steps (FLUX.1-schnell, Turbo, Lightning), which training blurs.
    pretrained.allow_distilled = False
    # Pixels: height = width, or (height, width).
    config.resolution = config_dict.FieldReference(512, field_type=object)

    # A name under dataset/ or a folder, with train and test .txt or _metadata.jsonl files.
    config.dataset = ""
    # True: the run may continue with prompt files that have changed (by SHA-256) since its last
    # start; scores on changed test prompts are not compared with former ones.
    config.allow_changed_prompts = False
    # Reward name -> weight; the total is the weighted sum.  Names: diffusion_nft.rewards.REWARDS.
    config.reward_fn = ml_collections.ConfigDict({}, allow_dotted_keys=True)
    # Reward name -> addresses of its servers (scripts/reward_server.py), which share the load;
    # other rewards are scored locally.  In a preset, as for the options below:
    #     with config.reward_servers.unlocked():
    #         config.reward_servers.geneval = ("http://gpu7:8000", "http://gpu8:8000")
    # On the command line: --config.reward_servers="{'geneval': ('http://gpu7:8000',)}".  The
    # environment variable REWARD_SERVER_TOKEN holds the servers' token.
    config.reward_servers = ml_collections.ConfigDict({}, allow_dotted_keys=True)
    # Seconds that a server may take for a batch, including its queue.
    config.reward_server_timeout_seconds = 300.0
    # Reward name -> arguments of its class, such as {"ocr": {"backend": "paddleocr"}}.  "device"
    # ("cpu", "cuda:1"; with several processes per node "shared:cuda:1") places the reward; "dtype"
    # is fp32, fp16 or bf16.
    config.reward_options = ml_collections.ConfigDict({}, allow_dotted_keys=True)
    # Maximum number of images per epoch or evaluation without a score: NaN or infinite images, and
    # those on which a reward fails.  They are excluded from statistics and training, and counted as
    # reward/unscored and eval/unscored.  More end the run, which can continue with a larger number.
    config.max_unscored = 0

    config.sample = sample = ml_collections.ConfigDict()
    # Prompts per epoch, and images per prompt.  Their product is the epoch's batch in total; ranks
    # take near-equal shares.
    sample.num_groups = 48
    sample.num_image_per_prompt = 24
    # Micro-batch of images sampled per rank; affects memory, not results.
    sample.batch_size = 16
    # Solver (a name in diffusion_nft.solvers.SOLVERS or a diffusers scheduler class) and its steps.
    sample.solver = "dpm2"
    sample.num_steps = 10
    # Noise of the stochastic solvers flow, dance and ddim (0: their ODE); not used by the others.
    sample.noise_level = 0.7
    # Classifier-free guidance of the rollout (1: none).  Of the losses only flow_grpo uses it.
    sample.guidance_scale = 1.0
    # Negative prompt of guidance, in rollouts and evaluation, for lines without "negative_prompt".
    sample.negative_prompt = ""
    # Standard deviation of the advantage over the whole epoch (True) or over each group (False).
    sample.global_std = True
    # Standardise each reward per group before the weighted sum, so that weights do not depend on
    # the rewards' scales.
    sample.standardize_rewards = False

    config.train = train = ml_collections.ConfigDict()
    # Micro-batch of (sample, sigma) pairs per rank; affects memory, not results.  0: found by
    # trials at each start to fill 90 % of the GPU's memory, to an eighth and at most 256 (96 on
    # CPUs).
    train.batch_size = 8
    # Optimizer steps per pass over the epoch's samples; each takes an equal share of every group.
    train.gradient_step_per_epoch = 1
    # Passes over the epoch's samples, each with fresh noise.
    train.num_inner_epochs = 1
    # The noisiest int(num_steps * sigma_range) of the sampler's sigmas are trained on, and each
    # sample at int(that * timestep_fraction) of them; both are at least 1.
    train.sigma_range = 1.0
    train.timestep_fraction = 0.99
    # Choice of these sigmas per sample: random | stratified (one per equal part of the sampler's
    # path) | first (the noisiest).
    train.sigma_choice = "random"
    # Train all images of a prompt with the same noise and sigmas.
    train.shared_noise = False
    # Skip prompts whose images all have the same score, and so zero advantage.  This drops their KL
    # term, too.
    train.filter_zero_std_groups = False
    train.learning_rate = 3e-4
    # Half-life of the learning rate in epochs; 0: constant.
    train.lr_half_life = 0.0
    train.adam_beta1 = 0.9
    train.adam_beta2 = 0.999
    train.adam_weight_decay = 1e-4
    train.adam_epsilon = 1e-8
    train.max_grad_norm = 1.0
    # Advantages are clipped to +-adv_clip_max, then shaped: all | positive_only | negative_only |
    # one_only | binary.
    train.adv_clip_max = 5.0
    train.adv_mode = "all"
    # Linear layers with LoRA: attention | attention+mlp (see docs/models.md), a tuple of ends of
    # names, or a regular expression of whole names.
    train.lora_targets = config_dict.FieldReference("attention", field_type=object)
    train.lora_rank = 32
    train.lora_alpha = 64
    # A LoRA of this rank (a PEFT folder or a diffusers file) from which the current and the old
    # policy start, and whose layers are trained; the reference is the base model.
    train.lora_path = ""
    # EMA of the trained weights for evaluation and export, with decay min((1+s)/(10+s), ema_decay)
    # at optimizer step s; 0: off.
    train.ema_decay = 0.9
    # Maximum number of consecutive updates skipped for a non-finite gradient.
    train.max_skipped_steps = 20

    config.nft = nft = ml_collections.ConfigDict()
    # Mixing strength of the implicit positive and negative policies; 1/beta: guidance strength.
    nft.beta = 1.0
    # Weight of mean (v_theta - v_ref)^2.
    nft.kl_weight = 1e-4
    # adaptive | uniform | sigma | one_minus_sigma (see algorithms/nft.py).
    nft.weighting = "adaptive"
    # False drops the (1-r) term: the paper's no-negative ablation.
    nft.negative_branch = True
    # Schedule of the decay eta of the sampling policy, updated once per epoch:
    # theta_old <- eta theta_old + (1 - eta) theta.  on_policy | linear_to_half | linear_to_095 |
    # delayed_linear | constant_09, or linear:SLOPE:START:CAP, with
    # eta = min(SLOPE (optimizer step - START), CAP).
    nft.old_policy_decay = "linear_to_half"

    # For algorithm "flow_grpo".
    config.grpo = grpo = ml_collections.ConfigDict()
    # The ratio of new to old probability is clipped to 1 +- clip_range.  Ratios are close to 1, as
    # the log-probability of a step is a mean over its elements.
    grpo.clip_range = 1e-4
    # Weight of the KL divergence of a step's Gaussian from the reference's.
    grpo.kl_weight = 0.04

    # For algorithms "reward_weighted", "advantage_weighted" and "best_of_n".
    config.matching = matching = ml_collections.ConfigDict()
    # Weighting of the flow-matching error: uniform | sigma | one_minus_sigma | adaptive (see
    # algorithms/nft.py).
    matching.weighting = "uniform"
    # Weight of mean (v_theta - v_ref)^2.
    matching.kl_weight = 1e-4
    # reward_weighted: weight exp(advantage / temperature) per sample.
    matching.temperature = 1.0
    # best_of_n: number of images per prompt to train on.
    matching.best_of = 1
    # advantage_weighted: the ratio exp(old error - new error) is clipped to 1 +- clip_range.
    matching.clip_range = 1.0

    config.eval = evaluation = ml_collections.ConfigDict()
    # Rewards that are only evaluated, not trained on.
    evaluation.held_out_rewards = ()
    # Number of test lines, a fixed random subset; 0: all.
    evaluation.num_prompts = 0
    evaluation.num_steps = 40
    evaluation.solver = "flow"
    evaluation.guidance_scale = 1.0
    # Pixels as resolution, or 0: the same.
    evaluation.resolution = config_dict.FieldReference(0, field_type=object)
    # Micro-batch of images; test lines are distributed to the ranks in chunks of this size.
    evaluation.batch_size = 16
    # Seed of the noise, keyed by (eval.seed, line): runs with different seeds are compared on the
    # same noise.
    evaluation.seed = 42
    # Evaluate before the first epoch.
    evaluation.at_start = True

    # Alarms for signs that the reward rises at the cost of the images (tracking/monitor.py).
    config.monitor = monitor = ml_collections.ConfigDict()
    # off | warn | stop (after saving; the same command continues to the next alarm) | raise_kl (an
    # alarm doubles the KL weight, up to 64 times, for the rest of the run or its stage).
    monitor.action = "warn"
    # Also evaluate brightness, saturation and edges, as the held-out reward image_statistics.
    monitor.image_statistics = False
    # Maximum drop of an evaluated reward or component below its best evaluation so far, over all
    # lines or those of a tag, in standard errors.
    monitor.max_drop = 3.0
    # Maximum relative drop of diversity below the first evaluation.
    monitor.max_diversity_drop = 0.3
    # Maximum relative change of the latents' RMS, brightness, saturation or edges.
    monitor.max_image_change = 0.3
    # Maximum distance to the reference, loss/kl (0: no limit).
    monitor.max_kl = 0.0

    config.checkpoint = checkpoint = ml_collections.ConfigDict()
    # Number of newest checkpoints to keep (0: all); the best one by evaluation is also kept.
    checkpoint.keep = 3

    config.perf = perf = ml_collections.ConfigDict()
    # Size of the LRU cache of prompt embeddings in host memory.
    perf.embed_cache_gb = 2.0
    # Keep the text encoders in host memory while they are not encoding.
    perf.offload_text_encoders = False
    # Micro-batch of decoded latents.
    perf.vae_batch_size = 8
    # Recompute activations in the backward pass: less memory, about a third more training time.
    perf.gradient_checkpointing = False
    # torch.compile the transformer's blocks, once per policy and batch size: minutes at the start.
    perf.compile = False

    config.log = log = ml_collections.ConfigDict()
    # online | offline | off.  Without an API key, online falls back to offline.
    log.wandb = "online"
    log.wandb_project = "diffusion-nft"
    log.tensorboard = False
    # Images per image grid, at most the main rank's, and epochs between grids of training samples
    # (0: none).
    log.num_images = 16
    log.image_freq = 10

    config.distributed = distributed = ml_collections.ConfigDict()
    # Time-out of collectives, which must exceed the time of the slowest reward.
    distributed.timeout_minutes = 60.0

    return config.lock()
