"""Every configuration key, with its meaning and default.

A preset (config/nft.py) starts from ``get_config()`` and changes what it must.  The tree is locked:
a misspelt key is an error.  Allowed values are in
``diffusion_nft/validation/schema.py``, which refuses a bad configuration before any model is
loaded.  Every key can be set on the command line:
``--config.train.learning_rate=1e-4``.

For whoever adds a key: with its default the numbers must be as they were before the key existed.  A
run of an earlier version, whose files lack the key, is continued with the default.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The defaults: SD3.5-Medium at 512 px, the published hyper-parameters, no data, no reward."""
    config = ml_collections.ConfigDict()

    # Name shown in wandb; empty: the last part of save_dir.
    config.run_name = ""
    # The run directory.  The same command continues the run that lies there.
    config.save_dir = ""
    # All randomness is a function of (seed, epoch, sample, purpose): never of ranks or batch sizes.
    # Evaluation's noise too: compare the gains of runs whose seeds differ.
    config.seed = 42
    # The loss: a name in diffusion_nft.algorithms.ALGORITHMS.
    config.algorithm = "nft"
    # One epoch = sample, score, train, refresh the old policy.  In a run in stages, the most it
    # makes.
    config.num_epochs = 100_000
    # A run in stages: a tuple of mappings, one a stage, each with its own "num_epochs" and, by
    # dotted key, what is different in it: dataset, reward_fn (all of it), sample.*, nft.*, grpo.*,
    # matching.*, eval.* and train.* but train.lora_* and train.adam_*.  Whatever a stage does not
    # set is as below.
    #     config.stages = (
    #         {"num_epochs": 800},
    #         {"num_epochs": 300, "dataset": "geneval", "reward_fn": {"geneval": 1.0}},
    #     )
    # The run then ends at the sum of them, or at the num_epochs above if that is less.  Weights,
    # optimizer, EMA and the counts of epochs and steps, on which the schedules depend, go on.
    config.stages = ()
    # Epochs between checkpoints, and between evaluations (0: only at the end).
    config.save_freq = 30
    config.eval_freq = 10
    # Precision of the frozen weights and of autocast: fp16, bf16, no (fp32), fp64 (for
    # verification).
    config.mixed_precision = "fp16"
    # TF32 matrix products on GPUs that have them.
    config.allow_tf32 = True
    # Begin with the policies of another run (a checkpoint or a run directory); counters
    # and optimizer start anew.  Where save_dir already holds checkpoints, those continue instead.
    config.resume_from = ""

    config.pretrained = pretrained = ml_collections.ConfigDict()
    # A diffusers folder or hub name.  "shapes" is the built-in model.
    pretrained.model = "stabilityai/stable-diffusion-3.5-medium"
    # Branch, tag or commit on the hub; empty: the default branch.
    pretrained.revision = ""
    # The family of the model: a name in diffusion_nft.models.MODELS.
    pretrained.model_type = "sd3"
    # T5 tokens per prompt (CLIP's 77 are the model's own).
    pretrained.max_sequence_length = 128
    # Pixels, height = width.
    config.resolution = 512

    # A name under dataset/ or a folder, holding train/test .txt or _metadata.jsonl files.
    config.dataset = ""
    # A run remembers its prompt files by their SHA-256.  True: it may continue with files that have
    # changed since; scores on changed test prompts are not compared with former ones.
    config.allow_changed_prompts = False
    # Reward name -> weight; the total is the weighted sum.  Names: diffusion_nft.rewards.REWARDS.
    config.reward_fn = ml_collections.ConfigDict({}, allow_dotted_keys=True)
    # Reward name -> addresses of its servers (scripts/reward_server.py), which share the load; a
    # reward without addresses is scored here.  In a preset, as for the options below:
    #     with config.reward_servers.unlocked():
    #         config.reward_servers.geneval = ("http://gpu7:8000", "http://gpu8:8000")
    # On the command line: --config.reward_servers="{'geneval': ('http://gpu7:8000',)}".  The
    # environment variable REWARD_SERVER_TOKEN holds the servers' token.
    config.reward_servers = ml_collections.ConfigDict({}, allow_dotted_keys=True)
    # Seconds that a server may take for a batch, waiting for its turn included.
    config.reward_server_timeout_seconds = 300.0
    # Reward name -> arguments of its class, such as {"ocr": {"backend": "paddleocr"}}.  "device"
    # ("cpu", "cuda:1") moves the reward there; "dtype" is fp32, fp16 or bf16.
    config.reward_options = ml_collections.ConfigDict({}, allow_dotted_keys=True)
    # Images of an epoch, or of an evaluation, that may have no score: NaN or infinite images, and
    # those on which a reward fails.  They are left out of all statistics and of training, and
    # counted as reward/unscored and eval/unscored.  One more ends the run, which may go on with a
    # larger number.
    config.max_unscored = 0

    config.sample = sample = ml_collections.ConfigDict()
    # Prompts per epoch, and images per prompt.  Their product is the epoch's batch, on any number
    # of GPUs: ranks take near-equal shares.
    sample.num_groups = 48
    sample.num_image_per_prompt = 24
    # Images sampled at once on a rank: a memory knob, the results do not depend on it.
    sample.batch_size = 16
    # Solver (a name in diffusion_nft.solvers.SOLVERS or a diffusers scheduler class) and its steps.
    sample.solver = "dpm2"
    sample.num_steps = 10
    # Noise of the stochastic solvers flow, dance and ddim (0: their ODE); the others have none.
    sample.noise_level = 0.7
    # Classifier-free guidance of the rollout; 1 = none.  Of the losses only flow_grpo's uses it.
    sample.guidance_scale = 1.0
    # Standard deviation of the advantage over the whole epoch (True) or over each group (False).
    sample.global_std = True
    # With several rewards: standardise each in its group before the weighted sum, so that a weight
    # counts deviations of its reward, whatever the reward's scale.
    sample.standardize_rewards = False

    config.train = train = ml_collections.ConfigDict()
    # (sample, sigma) pairs in one forward/backward on a rank: a memory knob.  0: as many as fit
    # 90 % of the GPU's memory, to an eighth and at most 256, found by trying at each start (96 on
    # CPUs).
    train.batch_size = 8
    # Optimizer steps per pass over the epoch's samples; each takes an equal share of every group.
    train.gradient_step_per_epoch = 1
    # Passes over the epoch's samples, each with fresh noise.
    train.num_inner_epochs = 1
    # Share of the sampler's sigmas that each sample is trained at, drawn per sample:
    # int(num_steps * timestep_fraction), at least 1.
    train.timestep_fraction = 0.99
    # Which of them: random (any) | stratified (one of each equal stretch of the sampler's path) |
    # first (the noisiest).
    train.sigma_choice = "random"
    # All images of a prompt are trained with the same noise and sigmas, not each with its own.
    train.shared_noise = False
    # Leave out prompts whose images all scored the same: their advantages are zero.  What else the
    # loss asks of them, such as the KL term, goes too.
    train.filter_zero_std_groups = False
    train.learning_rate = 3e-4
    # Epochs in which the learning rate halves, again and again; 0: it is constant.
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
    # LoRA on the attention projections.
    train.lora_rank = 32
    train.lora_alpha = 64
    # A LoRA of this rank (a PEFT folder or a diffusers file) that the current and the old policy
    # start from, and whose layers are trained; the reference stays the base.
    train.lora_path = ""
    # EMA of the trained weights, used for evaluation and export: decay min((1+s)/(10+s), ema_decay)
    # at optimizer step s; 0 turns it off.
    train.ema_decay = 0.9
    # Updates in a row that may be skipped for a non-finite gradient before the run stops.
    train.max_skipped_steps = 20

    config.nft = nft = ml_collections.ConfigDict()
    # Mixing strength of the implicit positive and negative policy; 1/beta is the guidance strength.
    nft.beta = 1.0
    # Weight of mean (v_theta - v_ref)^2.
    nft.kl_weight = 1e-4
    # adaptive | uniform | sigma | one_minus_sigma (see algorithms/nft.py).
    nft.weighting = "adaptive"
    # False drops the (1-r) term: the paper's no-negative ablation.
    nft.negative_branch = True
    # How fast the sampling policy follows, once an epoch: theta_old <- eta theta_old + (1 - eta)
    # theta.  on_policy | linear_to_half | linear_to_095 | delayed_linear | constant_09, or
    # linear:SLOPE:START:CAP, which is eta = min(SLOPE (optimizer step - START), CAP).
    nft.old_policy_decay = "linear_to_half"

    # Of algorithm "flow_grpo".
    config.grpo = grpo = ml_collections.ConfigDict()
    # The ratio of new to old probability is clipped to 1 +- clip_range.  The log-probability of a
    # step is a mean over its values, so ratios are close to 1.
    grpo.clip_range = 1e-4
    # Weight of the divergence of a step's Gaussian from the reference's.
    grpo.kl_weight = 0.04

    # Of algorithms "reward_weighted", "advantage_weighted" and "best_of_n".
    config.matching = matching = ml_collections.ConfigDict()
    # uniform | sigma | one_minus_sigma | adaptive: the flow-matching error (see algorithms/nft.py).
    matching.weighting = "uniform"
    # Weight of mean (v_theta - v_ref)^2.
    matching.kl_weight = 1e-4
    # reward_weighted: a sample's weight is exp(advantage / temperature).
    matching.temperature = 1.0
    # best_of_n: images of each prompt that are trained on.
    matching.best_of = 1
    # advantage_weighted: the ratio exp(old error - new error) is clipped to 1 +- clip_range.
    matching.clip_range = 1.0

    config.eval = evaluation = ml_collections.ConfigDict()
    # Rewards that are only evaluated, never trained on: held-out judges of what is gained.
    evaluation.held_out_rewards = ()
    # Lines of the test set to use, drawn once and for all; 0: all.
    evaluation.num_prompts = 0
    evaluation.num_steps = 40
    evaluation.solver = "flow"
    evaluation.guidance_scale = 1.0
    # Images sampled at once.  Test lines are dealt to the ranks in chunks of this size.
    evaluation.batch_size = 16
    # Evaluate before the first epoch.
    evaluation.at_start = True

    # Alarms: signs that the reward rises at the cost of the images (tracking/monitor.py).
    config.monitor = monitor = ml_collections.ConfigDict()
    # off | warn | stop (after saving; the same command goes on to the next alarm) | raise_kl (an
    # alarm doubles the weight of the KL term, up to 64 times; that stays for the run or its stage).
    monitor.action = "warn"
    # Also evaluate brightness, saturation and edges, as the held-out reward image_statistics.
    monitor.image_statistics = False
    # Alarming: an evaluated reward, or a component of one, lower than its best evaluation so far by
    # more than so many standard errors, over all lines or those of a tag,
    monitor.max_drop = 3.0
    # a diversity lower than at first by more than this share,
    monitor.max_diversity_drop = 0.3
    # a size of the latents, brightness, saturation or edges changed by more than this share,
    monitor.max_image_change = 0.3
    # and a distance to the reference, loss/kl, above this (0: any may be).
    monitor.max_kl = 0.0

    config.checkpoint = checkpoint = ml_collections.ConfigDict()
    # Newest checkpoints to keep (0: all); the best one by evaluation is kept besides.
    checkpoint.keep = 3

    config.perf = perf = ml_collections.ConfigDict()
    # Prompt embeddings kept in host memory, least recently used first out.
    perf.embed_cache_gb = 2.0
    # Keep the text encoders in host memory while they are not encoding.
    perf.offload_text_encoders = False
    # Latents decoded at once.
    perf.vae_batch_size = 8
    # Recompute activations in the backward pass: less memory, about a third more training time.
    perf.gradient_checkpointing = False
    # Compile the transformer's blocks (torch.compile), for each policy and each size of a batch
    # once: minutes at the start.
    perf.compile = False

    config.log = log = ml_collections.ConfigDict()
    # online | offline | off.  Without a key, online becomes offline with one line.
    log.wandb = "online"
    log.wandb_project = "diffusion-nft"
    log.tensorboard = False
    # Images per image grid, at most the main rank's, and epochs between grids of training samples
    # (0: none).
    log.num_images = 16
    log.image_freq = 10

    config.distributed = distributed = ml_collections.ConfigDict()
    # Time-out of collectives: a slow reward on one rank must not kill the others.
    distributed.timeout_minutes = 60.0

    return config.lock()
