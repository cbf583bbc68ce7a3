# No cloud here: only what follows from the figures. So it can be tested whole, without a provider.
terraform {
  required_version = ">= 1.9"
}

locals {
  # the first machine runs the cluster's control plane, the second holds the volume
  roles = merge(
    { for i in range(var.nodes) : i => "worker" },
    { 0 = "control" },
    var.nodes > 1 ? { 1 = "data" } : {},
  )

  blocks = flatten([
    for week in range(var.weeks) : [
      for day in sort([for d in var.block_days : tostring(d)]) : [
        for purpose in ["training", "evaluation"] : {
          name    = "${var.name}-${purpose}-${formatdate("YYYYMMDD", timeadd("${var.first_monday}T00:00:00Z", "${24 * (7 * week + tonumber(day))}h"))}"
          purpose = purpose
          gpus    = var.gpus[purpose]
          hosts   = ceil(var.gpus[purpose] / var.gpus_per_host)
          start   = timeadd("${var.first_monday}T00:00:00Z", "${24 * (7 * week + tonumber(day)) + var.block_start_hour}h")
          end     = timeadd("${var.first_monday}T00:00:00Z", "${24 * (7 * week + tonumber(day)) + var.block_start_hour + var.block_hours}h")
        } if var.gpus[purpose] > 0
      ]
    ]
  ])

  # What the Pods of deploy/helm ask for on machines without a GPU, rounded up, and the GPUs beside. While a version changes,
  # production's readers are there twice. Postgres, Prometheus, the gateway and the operators are not in it.
  needs = {
    none        = { cores = 0, memory_gb = 0, largest_gb = 0, gpus = 0 }
    development = { cores = 6, memory_gb = 9, largest_gb = 4, gpus = 0 }
    staging     = { cores = 6, memory_gb = 7, largest_gb = 2, gpus = 1 }
    production  = { cores = 24, memory_gb = 20, largest_gb = 2, gpus = 2 }
  }[var.environment]

  # the system and the cluster's own parts keep half a processor and 1 GB of each machine
  offer = {
    cores      = var.nodes * (var.machine.cores - 0.5)
    memory_gb  = var.nodes * (var.machine.memory_gb - 1)
    largest_gb = var.machine.memory_gb - 1
    gpus       = var.serving_gpus
  }
}
