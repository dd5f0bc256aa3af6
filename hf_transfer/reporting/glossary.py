"""Explains the words, the metrics and the parts of the cost of a report in one sentence each."""

METRICS = {  # key in results.json -> what the metric says
    "accuracy": "Share of images whose class is right.",
    "top5_accuracy": "Share of images whose class is among the five most likely.",
    "balanced_accuracy": "Mean of the classes' recalls: every class counts the same, however rare.",
    "macro_f1": "Mean of the classes' F1 scores: every class counts the same.",
    "nll": "Mean of -ln(probability of the true label): 0 is perfect, and sure mistakes cost most. Its unit is the nat.",
    "ece": "How far stated probabilities are from the share of right answers, on average.",
    "mean_average_precision": "How well each label ranks its images above the others, averaged over labels.",
    "f1_micro": "F1 score over all decisions, so frequent labels count more.",
    "f1_macro": "Mean of the labels' F1 scores: every label counts the same.",
    "exact_match": "Share of images whose labels are all right.",
    "r2": "Share of the spread of the numbers that the predictions explain: 1 is perfect, 0 is no better than the mean.",
    "mae": "Mean absolute error, in the unit of the number.",
    "rmse": "Root of the mean squared error: large errors count more than in the mean absolute error.",
    "spearman": "Whether predictions rank the images in the right order: 1 is perfect.",
}

WORDS = {
    "95 % interval": "In about 19 of 20 such samples of images, the interval contains the value for all images of this kind.",
    "chain": "The network as a sequence of layers, from the image to the output.",
    "cut": "The place in the chain before which nothing trains. Everything before it is computed once for each image.",
    "frozen": "Not trained: the weights stay those of the checkpoint.",
    "head": "The last layer, which turns features into outputs.",
    "features": "What the head reads: the numbers by which the network describes an image.",
    "linear probe": "A linear classifier on frozen features, solved exactly.",
    "readout": "The way features are computed from the last activations, such as the mean over the image (avg) or the mean and "
    "the maximum (avg+max). 'native' is the checkpoint's own way.",
    "suspected label": "A label that networks which had not seen the image find improbable, so that it may be wrong.",
    "near copy": "Another picture of the same scene, or the same picture in another size, crop or quality.",
    "kNN": "Each image gets the label of most of its nearest neighbors by features; nothing is trained.",
    "C": "The inverse strength of the probe's regularization: a larger C lets the probe fit the training images more closely.",
    "held-out": "Not trained on: images that judge a network fairly.",
    "recall": "Share of the images of a label that are recognized.",
    "precision": "Share of the predictions of a label that are right.",
    "F1": "The harmonic mean of precision and recall.",
    "temperature": "The number by which the outputs are divided, so that probabilities match the share of right answers.",
}

COSTS = {  # part of the cost in results.json -> what it did
    "data": "read the data set and look for copies",
    "checkpoint": "load the network",
    "engine": "choose what runs the frozen layers",
    "chain": "find the cuts, and check them",
    "features": "run the frozen layers once over all images",
    "store": "store the inputs of the trained layers",
    "probe": "solve the linear probe",
    "train": "gradient steps",
    "wise ft": "mix the trained weights with those from before",
    "advise": "estimate what fine-tuning may add",
    "evaluate": "measure the finished network",
    "confidence": "calibrate it, and measure how far it can be trusted",
    "save": "write the model",
    "report": "choose and draw the images of this page",
}
