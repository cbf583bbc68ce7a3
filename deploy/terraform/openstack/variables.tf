variable "name" {
  description = "First part of every name that is made."
  type        = string
  default     = "cxr"
}

variable "nodes" {
  description = "Virtual machines that run all the time."
  type        = number
  default     = 4
}

variable "storage_gb" {
  description = "Persistent volume, GB."
  type        = number
  default     = 100
}

variable "occasional_ip" {
  description = "A second public address."
  type        = bool
  default     = false
}

variable "gpus" {
  description = "GPUs of one block, by purpose."
  type        = object({ training = number, evaluation = number })
  default     = { training = 4, evaluation = 2 }
}

variable "first_monday" {
  description = "The Monday on which the plan of leases starts."
  type        = string
}

variable "weeks" {
  description = "How many weeks of leases are planned."
  type        = number
  default     = 4
}

variable "admin_cidr" {
  description = "The network from which operators come."
  type        = string
}

variable "clinic_cidr" {
  description = "The network from which films come."
  type        = string
}

variable "private_cidr" {
  description = "The private network."
  type        = string
  default     = "10.40.0.0/24"
}

variable "public_key" {
  description = "The operators' SSH key, public part."
  type        = string
}

variable "flavor" {
  description = "Flavor of the machines."
  type        = string
  default     = "m1.medium"
}

variable "image" {
  description = "Image of the machines."
  type        = string
  default     = "CC-Ubuntu24.04"
}

variable "gpu_flavor" {
  description = "Flavor of a leased machine."
  type        = string
  default     = "baremetal"
}

variable "gpu_image" {
  description = "Image of a leased machine, with the GPU's driver."
  type        = string
  default     = "CC-Ubuntu24.04-CUDA"
}

variable "reservations" {
  description = "Running leases: name of the machine to id of the reservation."
  type        = map(string)
  default     = {}
}

variable "public_network" {
  description = "The network that floating IPs come from."
  type        = string
  default     = "public"
}

variable "dns" {
  description = "Name servers."
  type        = list(string)
  default     = []
}
