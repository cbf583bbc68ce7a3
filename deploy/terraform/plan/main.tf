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
          start   = timeadd("${var.first_monday}T00:00:00Z", "${24 * (7 * week + tonumber(day)) + var.block_start_hour}h")
          end     = timeadd("${var.first_monday}T00:00:00Z", "${24 * (7 * week + tonumber(day)) + var.block_start_hour + var.block_hours}h")
        } if var.gpus[purpose] > 0
      ]
    ]
  ])
}
