"""The experiments of `scripts/experiment.py`: the methods that they compare, and the options that each begins with."""

# The methods that k and T_d matter to; those of NEXT are trained at the next rho that was tried above the chosen one;
# those of LATE begin with plain SGD for 7/8 of the epochs, whatever T_d is.
SETS = ("sharpbalance", "sharpbalance_paper", "plain_start", "random", "random_paper", "same")
NEXT = ("sharpbalance_next", "sharpbalance_paper_next")
LATE = ("late_sam", "late_sharpbalance")
METHODS = ("deep_ensemble", "eoa", "sam", "deep_ensemble_sam", *LATE, "asam", *SETS, *NEXT)
# Passes of a training, of those of a plain one, with T_d at half of the epochs and about 0.8 of the images in a set.
PASSES = {"deep_ensemble": 1.0, "eoa": 1.0, **dict.fromkeys(METHODS[2:], 2.0), **dict.fromkeys((*SETS, *NEXT), 1.9)}
PASSES |= {"plain_start": 1.4, **dict.fromkeys(LATE, 1.1)}
# Of what may be chosen: its option, the method that chooses among several values, and the methods that it matters to.
CHOICES = {
    "rho": ("--rho", "sam", tuple(one for one in METHODS if one not in ("deep_ensemble", "eoa", "asam"))),
    "k": ("--flat_ratio", SETS[0], (*SETS, *NEXT, "late_sharpbalance")),
    "T_d": ("--initial_epochs", SETS[0], (*SETS, *NEXT)),
}
FOUR = ("deep_ensemble", "sam", "sharpbalance", "sharpbalance_paper")
TENS = ",".join(f"{ten}1 {ten}2 {ten}3" for ten in range(1, 11))
PAPER = f"--methods {','.join(FOUR)} --seeds '13 17 27,113 117 127,43 59 223' --model resnet18 --rho 0.2"
PAPER += " --flat_ratio 0.5 --initial_epochs 100 --variance --figures tradeoff benchmark ensemble_size severity"
PAPER += " --sharpness_flags '--mode APGD_worst,APGD_average,hessian_t,hessian_e,fisher,NTK'"
SMALL = f"--data fashion_mnist --seeds '{TENS}' --epochs 30 --validation 500 --batch_size 64 --augmentation flip"
SMALL += " --threads 1 --checkpoint last --jobs auto --sharpness_flags '--mode APGD_worst --norms l2 --batch_num 40'"
# Of the study, whose plan says why: what is trained in each setting.
CELLS = "--measure_flags '--mode predict,disagreement,ood --ood digits noise' --choose_on 3 --claims study"
CELLS += " --plan results/study/PLAN.md --by_image ensemble_nll ensemble_nll_calibrated 'auroc entropy'"
STUDY = f"{SMALL} {CELLS} --width 8 --ensembles 5 --rho 0.05 0.1 0.2 0.4 --flat_ratio 0.2 0.5 0.8 --initial_epochs 15"
RULES = "deep_ensemble,eoa,sam,sharpbalance,sharpbalance_paper,random"
SETTINGS = {
    "noise_0_images_1000": f"{RULES},random_paper",
    "noise_0.2_images_1000": f"{RULES},random_paper,{','.join(NEXT)},late_sam",
    "noise_0.4_images_1000": f"{RULES},random_paper,{','.join(NEXT)},{','.join(LATE)},plain_start",
    **{f"noise_{noise}_images_4000": RULES for noise in ("0", "0.2", "0.4")},
}
# With the networks of one of these settings, which are trained where they are missing, and its rho, k and T_d.
NOISY = f"{SMALL} --width 8 --label_noise 0.2 --images 1000 --ensembles 5 --rho 0.05 0.1 0.2 --flat_ratio 0.5 "
NOISY += "--initial_epochs 15 --choices results/study/noise_0.2_images_1000 --runs runs/study/noise_0.2_images_1000"
# By the name of an experiment, the words of its command line.
PRESETS = {
    "quickstart": "--data digits --methods deep_ensemble,deep_ensemble_sam,sharpbalance --rho 0.1 --flat_ratio 0.5 "
    "--seeds '13 17 27' --folder {method} --results none "
    "--sharpness_flags '--mode APGD_worst --norms l2 --batch_num 20'",
    "digits": f"--data digits --methods {','.join(FOUR)} --rho 0.1 --flat_ratio 0.5 --seeds '{TENS}' --ensembles 5 "
    "--corrupted 899 --checkpoint last --sharpness_flags '--mode APGD_worst --batch_num 20' "
    "--figures tradeoff benchmark",
    "cifar10": f"{PAPER} --data cifar10",
    "cifar100": f"{PAPER} --data cifar100",
    "tiny_imgnet": f"{PAPER} --data tiny_imgnet",
    "ablations": f"{PAPER} --methods sam,sharpbalance,sharpbalance_paper,random,same,asam,eoa --checkpoint last "
    "--runs runs/{data} --measurements measurements/{data}_ablations --results results/{data}_ablations",
    "fashion_mnist/noisy_labels": f"{NOISY} --methods {RULES} --corrupted 500 --plan results/study/PLAN.md "
    "--measure_flags '--mode predict,disagreement,KL,ood --ood digits corrupted noise' "
    "--by_image ensemble_nll ensemble_nll_calibrated aurc 'auroc max_probability' 'auroc entropy' "
    "'auroc mutual_information' 'auroc energy' --figures tradeoff benchmark severity ensemble_size ood reliability",
    "members": f"{NOISY} --methods {','.join(FOUR)} --plain_members 9 --choose_on 3 --figures ensemble_size "
    "--measure_flags '--mode predict,disagreement' --measurements measurements/{data}_members "
    "--results results/{data}_members",
    **{
        f"study/{name}": f"{STUDY} --label_noise {name.split('_')[1]} --images {name.split('_')[3]} --methods {methods}"
        for name, methods in SETTINGS.items()
    },
    # The same comparison on somebody's own images.
    "mine": f"{SMALL.replace('fashion_mnist', 'folder')} {CELLS} --width 8 --ensembles 5 --methods {RULES} "
    "--image_size 32 --images 1000 --rho 0.05 0.1 0.2 --flat_ratio 0.5 --initial_epochs 15 "
    "--results results/mine/mine",
    "regime": "--data fashion_mnist --methods deep_ensemble,sam --rho 0.05 0.1 --seeds '11 12 13' --batch_size 64 "
    "--threads 1 --jobs auto --images 2000 --validation 2000 --skip_measuring",
}
